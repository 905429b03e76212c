"""Episodes in, sequence windows out."""
