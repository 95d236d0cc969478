"""The data set and the baseline of `ngame demo`."""
