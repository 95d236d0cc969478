"""Data sets: files in, texts, labels and tokens out."""
