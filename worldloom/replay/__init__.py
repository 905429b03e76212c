"""Episodes in, sequence windows out."""

from worldloom.replay.buffer import ReplayBuffer
from worldloom.replay.datasets import from_hdf5, from_minari
from worldloom.replay.store import ReplayStore

__all__ = ["ReplayBuffer", "ReplayStore", "from_hdf5", "from_minari"]
