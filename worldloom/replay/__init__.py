"""Episodes in, sequence windows out."""

from worldloom.replay.buffer import ReplayBuffer

__all__ = ["ReplayBuffer"]
