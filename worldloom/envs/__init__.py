"""Environments behind one small shape."""
