"""Doors for those who come from other libraries: their names and arguments over our core."""
