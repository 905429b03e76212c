"""Episodes in, sequence windows out."""

from worldloom.replay.buffer import ReplayBuffer
from worldloom.replay.datasets import from_hdf5, from_minari

__all__ = ["ReplayBuffer", "from_hdf5", "from_minari"]
