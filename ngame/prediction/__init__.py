"""A trained model: scorers, their fusion, approximate search."""
