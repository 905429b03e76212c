"""When updates are due while environments are stepped."""

from __future__ import annotations

from typing import NamedTuple

from worldloom.training.config import TrainingConfig


class TrainRatio(NamedTuple):
    """Updates due as a function of decision steps (actions taken, over all environments).

    Attributes:
      prefill: decision steps before the first update.
      burst: updates due at once then.
      ratio: rows to be replayed per decision step from there on.
      rows: rows under gradient in one update's batch.
    """

    prefill: int
    burst: int
    ratio: float
    rows: int

    @classmethod
    def of(cls, config: TrainingConfig, rows: int) -> TrainRatio:
        """That of a run whose windows have ``rows`` rows under gradient."""
        replayed = config.batch_size * rows
        return cls(config.prefill, config.prefill_updates, config.train_ratio or replayed, replayed)

    def updates(self, decisions: int) -> int:
        """Updates due after ``decisions`` decision steps in all."""
        if decisions < self.prefill:
            return 0
        # Divided last: 49 times 1/49 is less than 1 in floating point.
        return self.burst + int((decisions - self.prefill) * self.ratio / self.rows)
