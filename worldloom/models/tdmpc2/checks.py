"""What TD-MPC2's methods refuse before they compute anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from worldloom.errors import DataError
from worldloom.models.base import check_environments
from worldloom.models.tdmpc2.config import TDMPC2Config


def check_keys(batch: Mapping[str, Any], *names: str) -> None:
    """Raise ``DataError`` for entries that a batch lacks."""
    if missing := [name for name in names if name not in batch]:
        raise DataError(f"The batch has no {', '.join(missing)}; it has {', '.join(sorted(batch))}.")


def check_tasks_fit(config: TDMPC2Config, task: Any, batch_shape: tuple[int, ...]) -> None:
    """Raise ``DataError`` unless ``task`` broadcasts to ``batch_shape``, or is None where there is a single task."""
    if not config.multitask:
        if task is not None:
            raise DataError("This model has one task; leave task out, or build it with num_tasks.")
        return
    if task is None:
        raise DataError(f"This model has {config.num_tasks} tasks; give task=, integers of shape [B].")
    try:
        fits = jnp.broadcast_shapes(jnp.shape(task), batch_shape) == batch_shape
    except ValueError:
        fits = False
    if not fits:
        raise DataError(f"task has shape {jnp.shape(task)}; it belongs to a batch of shape {batch_shape}.")


def check_what_acts(count: int, carry: jax.Array | None, is_first: Any, task: Any, explore: Any) -> None:
    """Raise ``DataError`` unless all are of ``count`` environments, and ``explore`` is one bool."""
    check_environments(count, None if carry is None else carry.shape[0], is_first)
    if task is not None and jnp.shape(task) != (count,):
        raise DataError(f"task has shape {jnp.shape(task)}; act takes one for each environment, ({count},).")
    if jnp.shape(explore) != ():
        raise DataError(f"explore has shape {jnp.shape(explore)}; it is one bool for all environments.")
