"""Replayed rows, prepared for the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from worldloom.errors import DataError
from worldloom.models.dreamer.arrays import embed_actions, prepare_observations
from worldloom.models.dreamer.config import DreamerV3Config
from worldloom.models.dreamer.rssm import Latent


class TrainBatch(NamedTuple):
    """The rows that count in the loss, [B, T, ...]; every entry belongs to *arriving at* the row's observation.

    Attributes:
      obs: observations by name.
      previous_actions: embedded actions [B, T, A] that led to the row; zeros before the first row.
      rewards: [B, T].
      is_first, is_last, is_terminal: [B, T] float, 1 where true.
      initial: stored state before the first row, [B, ...], or None to start from zeros.
    """

    obs: dict[str, jax.Array]
    previous_actions: jax.Array
    rewards: jax.Array
    is_first: jax.Array
    is_last: jax.Array
    is_terminal: jax.Array
    initial: Latent | None


def prepare_batch(config: DreamerV3Config, batch: Mapping[str, Any], dtype: jnp.dtype) -> TrainBatch:
    """Check a batch, pair each observation with the action before it, and split off the context row.

    Args:
      config: names and shapes of observations and actions.
      batch: ``obs``, ``actions``, ``rewards`` and ``is_terminal`` (or ``continues`` = 1 − is_terminal), all
        [B, T, ...]. Without ``is_first`` no row is an episode's start; without ``is_last`` only terminal rows and
        those before an ``is_first`` end one. With ``context`` = ``{"deter": [B, D], "stoch": [B, S, C]}``, the latent
        stored with row 0, only that latent and the action of row 0 are used, and the loss counts rows 1 … T − 1.
      dtype: of embedded actions and the stored latent.

    Raises:
      DataError: a key is missing or a shape does not fit.
    """
    # Keys and shapes of what is [B, T].
    missing = [name for name in ("obs", "actions", "rewards") if name not in batch]
    if "is_terminal" not in batch and "continues" not in batch:
        missing.append("is_terminal (or continues)")
    if missing:
        raise DataError(f"The batch has no {', '.join(missing)}; it has {', '.join(sorted(batch))}.")
    rewards = jnp.asarray(batch["rewards"], jnp.float32)
    shape, context = rewards.shape, batch.get("context")
    if len(shape) != 2 or shape[1] < 2 + (context is not None):
        raise DataError(f"rewards has shape {shape}; [B, T] with at least 2 rows, and 3 with a context, is expected.")
    terminal = _flag(batch, "is_terminal", shape) if "is_terminal" in batch else 1 - _flag(batch, "continues", shape)
    first = _flag(batch, "is_first", shape) if "is_first" in batch else jnp.zeros(shape)
    last = _flag(batch, "is_last", shape) if "is_last" in batch else terminal
    # An episode that was cut off without an end (a crashed collector) ends where the next one begins.
    last = last.at[:, :-1].max(first[:, 1:])

    obs = prepare_observations(config, batch["obs"], 2)
    actions = embed_actions(config, batch["actions"], 2, dtype)
    for name, array in [*obs.items(), ("actions", actions)]:
        if array.shape[:2] != shape:
            raise DataError(f"{name} has {array.shape[:2]} rows where rewards has {shape}.")

    # Row t gets the action of row t − 1. Without a context, none led to row 0.
    if context is None:
        previous = jnp.pad(actions[:, :-1], ((0, 0), (1, 0), (0, 0)))
        return TrainBatch(obs, previous, rewards, first, last, terminal, None)
    windows, stoch = shape[0], (config.num_latents, config.num_categories)
    deter = _stored(context, "deter", (windows, config.deter_dim), dtype)
    initial = Latent(deter, _stored(context, "stoch", (windows, *stoch), dtype))
    obs, rewards, first, last, terminal = jax.tree.map(lambda x: x[:, 1:], (obs, rewards, first, last, terminal))
    return TrainBatch(obs, actions[:, :-1], rewards, first, last, terminal, initial)


def _flag(batch: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> jax.Array:
    flag = jnp.asarray(batch[name], jnp.float32)
    if flag.shape != shape:
        raise DataError(f"{name} has shape {flag.shape} where rewards has {shape}.")
    return flag


def _stored(context: Mapping[str, Any], name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    if name not in context:
        raise DataError(f"The batch's context has no '{name}'; it holds the stored deter [B, D] and stoch [B, S, C].")
    if jnp.shape(context[name]) != shape:
        raise DataError(f"context['{name}'] has shape {jnp.shape(context[name])}; the config needs {shape}.")
    return jax.lax.stop_gradient(jnp.asarray(context[name], dtype))
