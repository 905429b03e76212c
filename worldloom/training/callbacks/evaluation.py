"""Measure on held-out data while training."""

from __future__ import annotations

from typing import Any

from worldloom.config import check
from worldloom.training.callbacks.base import Answer, Callback, StepInfo
from worldloom.training.config import TrainingConfig
from worldloom.training.evaluation import evaluate


class EvalCallback(Callback):
    """Publishes the mean loss terms on held-out data as ``eval/loss`` and ``eval/loss/<term>``.

    Args:
      buffer: held-out episodes, such as the second part of ``ReplayBuffer.split``.
      every: steps between two evaluations; None follows ``TrainingConfig.eval_interval``.
      batches: batches an evaluation averages over, the same ones every time.
      seed: which ones.
    """

    order = -1
    measures = True

    def __init__(self, buffer: Any, every: int | None = None, *, batches: int = 8, seed: int = 0):
        check(every is None or (isinstance(every, int) and every >= 1), f"every must be an integer ≥ 1, not {every!r}.")
        check(isinstance(batches, int) and batches >= 1, f"batches must be an integer ≥ 1, not {batches!r}.")
        self.buffer, self.every, self.batches, self.seed = buffer, every, batches, seed

    def interval(self, config: TrainingConfig) -> int:
        """``every``, or ``config.eval_interval``."""
        return config.eval_interval if self.every is None else self.every

    def on_step(self, info: StepInfo) -> Answer:
        """Evaluate the weights of this step."""
        terms = evaluate(info.model(), self.buffer, info.config, batches=self.batches, seed=self.seed)
        return {f"eval/loss/{name}" if name != "loss" else "eval/loss": value for name, value in terms.items()}
