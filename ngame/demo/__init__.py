"""A data set and a baseline for `ngame demo`."""
