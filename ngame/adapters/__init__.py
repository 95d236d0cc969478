"""The batches in other trainers: one module for each library, the only one that imports it."""
