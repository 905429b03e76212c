"""States along recorded sequences, for every family: what reports and imagined environments start from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from worldloom.ops.keys import step_keys


def task_argument(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """``{"task": [B]}`` if ``batch`` has tasks and the methods of ``model`` take them, else an empty dict."""
    takes_task = "task" in inspect.signature(model.encode).parameters and getattr(model.config, "multitask", True)
    return {"task": np.asarray(batch["task"])} if takes_task and "task" in batch else {}


def observe_sequence(
    model: Any, obs: Any, actions: Any, keys: tuple[Any, Any] = (None, None), task: Mapping[str, Any] | None = None
) -> Any:
    """Posterior states [T, B, ...] of all rows; row 0 is encoded as the first of an episode. May be traced.

    Args:
      model: a world model.
      obs: observations [T, B, ...].
      actions: actions [T − 1, B, ...]; entry t leads from row t to row t + 1.
      keys: for the first row and for the others; None takes modes.
      task: what :func:`task_argument` returned.
    """
    task = task or {}
    first = model.encode(jax.tree.map(lambda x: x[0], obs), keys[0], **task)

    def step(state: Any, row: Any) -> tuple[Any, Any]:
        action, seen, key = row
        state = model.observe(state, action, seen, key, **task)
        return state, state

    later_obs = jax.tree.map(lambda x: x[1:], obs)
    _, later = jax.lax.scan(step, first, (actions, later_obs, step_keys(keys[1], len(jax.tree.leaves(obs)[0]) - 1)))
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, later)
