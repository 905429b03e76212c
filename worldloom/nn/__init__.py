"""Layers with weights and without algorithm, as Flax NNX modules."""
