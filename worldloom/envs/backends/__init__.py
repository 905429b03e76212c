"""How N environments are stepped: in this process, in subprocesses, or by a Gymnasium vector environment."""
