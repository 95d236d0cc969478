"""What happened in a run, as one HTML file."""
