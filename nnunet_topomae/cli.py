"""Console command."""
