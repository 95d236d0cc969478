"""Sparse and dense matrices, clusters and shortlists."""
