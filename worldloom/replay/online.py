"""Replay while rows are collected: which are fresh, and which belong to episodes that are over."""

from __future__ import annotations

import numpy as np

from worldloom.replay.buffer import ReplayBuffer
from worldloom.replay.sampling import fitting_segments


class OnlineQueue:
    """Windows of successive new rows, each handed out once, in the order in which they became complete.

    A stream is cut into windows from its first row on, whatever episodes they span, as in DreamerV3's ``Replay`` with
    ``online: True``. What is handed out is a function of the rows held and of :attr:`drawn`.

    Args:
      drawn: newest row whose window counts as handed out; ``-1`` for none.

    Attributes:
      drawn: see above; all that a checkpoint needs.
    """

    def __init__(self, drawn: int = -1):
        self.drawn = drawn

    def pop(self, buffer: ReplayBuffer, count: int, rows: int) -> np.ndarray:
        """Row numbers of the next windows, int64 [W ≤ count, rows]; without those that have lost rows."""
        windows = buffer._storage.index.windows_after(self.drawn, rows)[:count]
        if len(windows):
            self.drawn = int(windows[-1, -1])
        return windows


def has_finished_window(buffer: ReplayBuffer, rows: int, *, cross_episodes: bool) -> bool:
    """Whether ``buffer.draw(…, finished=True)`` finds a window of ``rows`` rows without an episode in progress."""
    return len(fitting_segments(buffer._storage.index, rows, cross_episodes, finished=True)[1]) > 0
