"""Returns of the episodes that online training collects."""

from __future__ import annotations

from typing import Any

import numpy as np

from worldloom.training.callbacks.base import Callback, CallbackResult, StepInfo


class EpisodesCallback(Callback):
    """Publishes ``collect/return`` and ``collect/length`` of the episodes that ended since the last log record, their
    number ``collect/episodes``, and ``collect/restarts``, how many environment processes had to be replaced so far.

    Online training adds it by itself. Episodes that a crash cut short are left out.

    Args:
      collector: where episodes end.
    """

    order = -1
    measures = True

    def __init__(self, collector: Any):
        self.collector = collector

    def on_step(self, info: StepInfo) -> CallbackResult:
        """Publish, if an episode ended."""
        counts = self._counts()
        self.collector.ends = []
        return counts

    def on_train_end(self, info: StepInfo) -> CallbackResult:
        """Publish the last ones. They stay, so that a run that goes on has the records of one that never stopped."""
        return self._counts()

    def _counts(self) -> CallbackResult:
        ends = [end for end in self.collector.ends if not end.crashed]
        counts = {"collect/episodes": float(len(ends)), "collect/restarts": float(self.collector.restarts)}
        if not ends:
            return counts if self.collector.restarts else None
        returns, lengths = [end.episode_return for end in ends], [end.length for end in ends]
        return {"collect/return": float(np.mean(returns)), "collect/length": float(np.mean(lengths)), **counts}
