"""Training in one call, without an object to keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worldloom.algorithm import TrainState
from worldloom.training.config import TrainingConfig
from worldloom.training.trainer import Trainer


def train(
    model: Any,
    buffer: Any,
    config: TrainingConfig | None = None,
    *,
    callbacks: Sequence[Any] | None = None,
    resume: bool | str | Path = False,
    **overrides: Any,
) -> TrainState:
    """Train ``model`` on ``buffer``: ``train(model, buffer, total_steps=1000, batch_size=8)``.

    See :class:`Trainer` and :meth:`Trainer.train`; ``overrides`` are fields of ``config`` to change.
    """
    trainer = Trainer(model, (config or TrainingConfig()).replace(**overrides), callbacks)
    return trainer.train(buffer, resume=resume)
