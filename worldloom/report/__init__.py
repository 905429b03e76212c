"""Curves, open-loop pictures and videos."""
