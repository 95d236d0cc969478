"""The two stages of training, and the run they write."""
