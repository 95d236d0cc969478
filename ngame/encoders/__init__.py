"""Text encoders, and what works on their vectors."""
