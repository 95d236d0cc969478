"""The batches inside trainers of others: one module a library, which alone imports that library."""
