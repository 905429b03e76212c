"""Mean loss terms on held-out data."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from worldloom.config import check
from worldloom.training.config import TrainingConfig
from worldloom.training.feed import Windows


def evaluate(
    model: Any, buffer: Any, config: TrainingConfig | None = None, *, batches: int = 8, seed: int = 0, **overrides: Any
) -> dict[str, float]:
    """Mean loss terms of ``model`` over windows of held-out data, every draw at its mode.

    The same arguments give the same windows and the same numbers. Compiled once per model config and batch shape.

    Args:
      model: a world model; it is not changed.
      buffer: the data, a ``ReplayBuffer``.
      config: batch size and sequence length; None takes the defaults of ``TrainingConfig``.
      batches: batches to average over.
      seed: which windows.
      **overrides: fields of ``config`` to change.

    Returns:
      ``{"loss": …, …}`` with the family's loss terms.

    Raises:
      DataError: the buffer is empty, has other shapes, or no episode is as long as a window.
    """
    config = (config or TrainingConfig()).replace(**overrides)
    check(isinstance(batches, int) and batches >= 1, f"batches must be an integer ≥ 1, not {batches!r}.")
    windows = Windows(buffer, model, config)
    # Started one after another and fetched together: the device need not wait for the host in between.
    terms = [model.compute_loss(windows.draw(seed, number)[0], key=None) for number in range(batches)]
    fetched = jax.device_get(terms)
    return {name: float(np.mean([batch[name] for batch in fetched], dtype=np.float64)) for name in fetched[0]}
