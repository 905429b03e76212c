"""Publishes returns and lengths of the episodes that online training collects."""

from __future__ import annotations

from typing import Any

import numpy as np

from worldloom.training.callbacks.base import Callback, CallbackResult, StepInfo


class EpisodesCallback(Callback):
    """Publishes means over the episodes that ended since the last log record: ``collect/return``, ``collect/length``.

    Also published are their number, ``collect/episodes``, ``collect/restarts``, the number of environment processes
    replaced so far, and, once there is one, ``collect/bad_steps``, the number of steps so far that returned NaN. Online
    training adds this callback itself. Episodes cut short by a crash are excluded.

    Args:
      collector: the run's collector.
    """

    order = -1
    measures = True

    def __init__(self, collector: Any):
        self.collector = collector

    def on_step(self, info: StepInfo) -> CallbackResult:
        """Publish if an episode ended, and clear the collector's list."""
        counts = self._counts()
        self.collector.ends = []
        return counts

    def on_train_end(self, info: StepInfo) -> CallbackResult:
        """Publish the last episodes. The list is kept, so a continued run has the records of an uninterrupted one."""
        return self._counts()

    def _counts(self) -> CallbackResult:
        ends = [end for end in self.collector.ends if not end.crashed]
        counts = {"collect/episodes": float(len(ends)), "collect/restarts": float(self.collector.restarts)}
        if self.collector.bad_steps:
            counts["collect/bad_steps"] = float(self.collector.bad_steps)
        if not ends:
            return counts if self.collector.restarts or self.collector.bad_steps else None
        returns, lengths = [end.episode_return for end in ends], [end.length for end in ends]
        return {"collect/return": float(np.mean(returns)), "collect/length": float(np.mean(lengths)), **counts}
