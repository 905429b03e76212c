"""Training: the config, the loop, callbacks, checkpoints and evaluation."""
