"""Weights of the official programs, in and out."""
