"""Settings to start from, by size: the reference program's, and what ``tiny`` learns well with on two CPU cores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worldloom.algorithm import Recipe, env_shapes, window_prefill

_REFERENCE: dict[str, Any] = {
    "batch_size": 16,
    "sequence_length": 64,
    "learning_rate": 4e-5,
    "warmup_steps": 1_000,
    "grad_clip": 0.0,
    "prefill": 1_100,
    "train_ratio": 512.0,
}
_TINY: dict[str, Any] = {
    "batch_size": 16,
    "sequence_length": 32,
    "learning_rate": 1e-3,
    "warmup_steps": 200,
    "grad_clip": 0.0,
    "prefill": 1_000,
    "train_ratio": 128.0,
    "eval_interval": 500,
    "save_interval": 1_000,
    "log_interval": 100,
}


def recipe(size: str, env: Any, given: Mapping[str, Any]) -> Recipe:
    """See :class:`worldloom.algorithm.Algorithm`."""
    training = {"device": "auto", **(_TINY if size == "tiny" else _REFERENCE)}
    if env is None:
        return Recipe({}, training, {}).override(given)
    shapes = env_shapes(env)
    reasons = dict.fromkeys(shapes, "of the environment")
    reasons |= window_prefill(training, env, given)
    return Recipe(shapes, training, reasons).override(given)
