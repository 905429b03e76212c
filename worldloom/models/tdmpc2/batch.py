"""Batches of TD-MPC2: what a public batch dict must hold, checked and brought to the shapes the losses use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from worldloom.errors import DataError
from worldloom.models.tdmpc2.config import TDMPC2Config


class TrainBatch(NamedTuple):
    """Windows of rows by the arrival rule: ``rewards[:, t]`` and ``terminated[:, t]`` belong to arriving at row t.

    S = T − H rollouts of H steps start in each window, one at each of its first S rows.

    Attributes:
      obs: [B, T, *obs_shape].
      actions: [B, T, A] float32, chosen at each row; one-hot if discrete.
      rewards: [B, T] float32.
      terminated: [B, T] float32, 1 where the row is terminal.
      weights: [B, S, H] float32, weight of each rollout step in the mean over the batch: 0 for steps beyond the end of
        the episode that the rollout starts in, equal for all others, and 1 on average.
      task: [B, 1] integers that broadcast against rows, or None for a single-task model.
    """

    obs: jax.Array
    actions: jax.Array
    rewards: jax.Array
    terminated: jax.Array
    weights: jax.Array
    task: jax.Array | None


def prepare_batch(config: TDMPC2Config, batch: Mapping[str, Any]) -> TrainBatch:
    """Check a public batch and convert it.

    Args:
      config: the model's config.
      batch: ``obs`` [B, T, *obs_shape]; ``actions`` [B, T, A], or integers [B, T] if discrete; ``rewards`` [B, T];
        ``is_terminal`` [B, T] or, in its place, ``continues`` = 1 − is_terminal; ``task`` integers [B] for multitask
        models. ``is_first`` [B, T] marks rows that begin an episode; without it every window is of one episode.

    Raises:
      DataError: a key is missing, a shape does not fit, or T is not above ``horizon``.
    """
    # Keys.
    missing = [name for name in ("obs", "actions", "rewards") if name not in batch]
    if missing or not ("is_terminal" in batch or "continues" in batch):
        raise DataError(
            f"A batch needs obs, actions, rewards and is_terminal (or continues); this one has {', '.join(batch)}."
        )

    # Values: dtypes, integers to one-hots, continues to terminations.
    rewards = jnp.asarray(batch["rewards"], jnp.float32)
    if rewards.ndim != 2 or rewards.shape[1] <= config.horizon:
        raise DataError(f"rewards has shape {rewards.shape}; [B, T] with T > horizon={config.horizon} is needed.")
    if "is_terminal" in batch:
        terminated = jnp.asarray(batch["is_terminal"]).astype(jnp.float32)
    else:
        terminated = 1.0 - jnp.asarray(batch["continues"]).astype(jnp.float32)
    actions = jnp.asarray(batch["actions"])
    if config.action_type == "discrete" and actions.ndim == 2:
        actions = jax.nn.one_hot(actions, config.action_dim)

    # Shapes.
    shapes = {
        "obs": (jnp.shape(batch["obs"]), (*rewards.shape, *config.obs_shape)),
        "actions": (actions.shape, (*rewards.shape, config.action_dim)),
        "is_terminal": (terminated.shape, rewards.shape),
    }
    for name, (given, needed) in shapes.items():
        if given != needed:
            raise DataError(f"{name} has shape {given}; {needed} is needed beside rewards of shape {rewards.shape}.")
    task = batch.get("task")
    if config.multitask and (task is None or jnp.shape(task) != rewards.shape[:1]):
        raise DataError(f"A multitask batch needs task, integers of shape {rewards.shape[:1]}.")

    column = jnp.asarray(task)[:, None] if config.multitask else None
    is_first = jnp.asarray(batch.get("is_first", jnp.zeros(rewards.shape))).astype(jnp.float32)
    weights = _rollout_weights(is_first, config.horizon)
    return TrainBatch(jnp.asarray(batch["obs"]), actions.astype(jnp.float32), rewards, terminated, weights, column)


def unfold(x: jax.Array, horizon: int) -> jax.Array:
    """Rollouts of H steps from every start, time first: [B, T−1, …] → [H, B, S, …], (h, b, s) being ``x[b, s + h]``."""
    starts = x.shape[1] + 1 - horizon
    return jnp.stack([x[:, h : h + starts] for h in range(horizon)])


def _rollout_weights(is_first: jax.Array, horizon: int) -> jax.Array:
    """[B, T] → ``TrainBatch.weights`` [B, S, H]."""
    # Step h of a rollout counts unless an episode began at one of the rows that steps 0 … h arrive at.
    same_episode = jnp.cumprod(1.0 - unfold(is_first[:, 1:], horizon), axis=0)
    # Each step is averaged over the rollouts that have it. If none has, the bound avoids 0 / 0 and weights stay 0.
    share = same_episode.mean((1, 2), keepdims=True)
    return jnp.moveaxis(same_episode / jnp.maximum(share, 1 / same_episode[0].size), 0, -1)
