"""The ratio of updates to environment steps in online training."""

from __future__ import annotations

from typing import NamedTuple

from worldloom.training.config import TrainingConfig


class TrainRatio(NamedTuple):
    """Number of updates due as a function of decision steps (actions taken, summed over all environments).

    Attributes:
      prefill: decision steps before the first update.
      burst: updates due at once when the prefill is complete.
      ratio: rows to replay per decision step after the prefill.
      rows: rows that gradients flow through in one update's batch.
    """

    prefill: int
    burst: int
    ratio: float
    rows: int

    @classmethod
    def of(cls, config: TrainingConfig, rows: int) -> TrainRatio:
        """The ratio of a run with ``rows`` rows under gradient per window."""
        replayed = config.batch_size * rows
        return cls(config.prefill, config.prefill_updates, config.train_ratio or replayed, replayed)

    def updates(self, decisions: int) -> int:
        """Total number of updates due after ``decisions`` decision steps."""
        if decisions < self.prefill:
            return 0
        # The division comes last: in floating point, 49 · (1 / 49) is less than 1.
        return self.burst + int((decisions - self.prefill) * self.ratio / self.rows)

    def decisions(self, updates: int) -> int:
        """Decision steps after which ``updates`` updates are due: the inverse of :meth:`updates`."""
        due = max(0, updates - self.burst)
        steps = self.prefill + int(due * self.rows / self.ratio)
        while self.updates(steps) < updates:
            steps += 1
        return steps
