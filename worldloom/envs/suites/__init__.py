"""Environments of other packages, as Gymnasium environments: DeepMind Control, Atari, Crafter."""
