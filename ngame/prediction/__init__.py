"""The trained model: its scorers, their fusion, and approximate search."""
