"""Pure mathematics: no weights, no configs, plain numbers as keyword arguments."""
