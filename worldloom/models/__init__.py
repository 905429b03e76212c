"""The two families of world models and the table that finds them by name."""
