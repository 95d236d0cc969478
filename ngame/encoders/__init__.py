"""Encoders of texts, and the vectors that they give."""
