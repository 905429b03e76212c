"""Batches of TD-MPC2: what a public batch dict must hold, checked and brought to the shapes the losses use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from worldloom.errors import DataError
from worldloom.models.tdmpc2.config import TDMPC2Config
from worldloom.models.tdmpc2.encoders import Observation
from worldloom.spaces import OBS


class TrainBatch(NamedTuple):
    """Windows of rows by the arrival rule: ``rewards[:, t]`` and ``terminated[:, t]`` belong to arriving at row t.

    S = T − H rollouts of H steps start in each window, one at each of its first S rows.

    Attributes:
      obs: [B, T, *obs_shape], or a dict of such arrays; :func:`cut` takes slices of its rows.
      actions: [B, T, A] float32, chosen at each row; one-hot if discrete.
      rewards: [B, T] float32.
      terminated: [B, T] float32, 1 where the row is terminal.
      weights: [B, S, H] float32, weight of each rollout step in the mean over the batch: 0 for steps beyond the end of
        the episode that the rollout starts in, equal for all others, and 1 on average.
      task: [B, 1] integers that broadcast against rows, or None for a single-task model.
    """

    obs: Any
    actions: jax.Array
    rewards: jax.Array
    terminated: jax.Array
    weights: jax.Array
    task: jax.Array | None


def prepare_batch(config: TDMPC2Config, batch: Mapping[str, Any]) -> TrainBatch:
    """Check a public batch and convert it.

    Args:
      config: the model's config.
      batch: ``obs`` [B, T, *obs_shape], or a dict of such arrays; ``actions`` [B, T, A], or integers [B, T] of
        discrete ones; ``rewards`` [B, T]; ``is_terminal`` [B, T] or, in its place, ``continues`` = 1 − is_terminal;
        ``task`` integers [B] for multitask models. ``is_first`` [B, T] marks rows that begin an episode; without it
        every window is of one episode.

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
    observations = {name: jnp.asarray(x) for name, x in _by_name(config, batch["obs"]).items()}
    shapes = {
        **{
            f"obs['{name}']" if isinstance(config.obs_shape, Mapping) else "obs": (
                observations[name].shape,
                (*rewards.shape, *shape),
            )
            for name, shape in config.observations.items()
        },
        "actions": (actions.shape, (*rewards.shape, config.action_dim)),
        "is_terminal": (terminated.shape, rewards.shape),
        "is_first": (jnp.shape(batch.get("is_first", rewards)), rewards.shape),
    }
    for name, (given, needed) in shapes.items():
        if given != needed:
            raise DataError(f"{name} has shape {given}; {needed} is needed beside rewards of shape {rewards.shape}.")
    task = batch.get("task")
    if config.multitask and (
        task is None or jnp.shape(task) != rewards.shape[:1] or not jnp.issubdtype(jnp.asarray(task).dtype, jnp.integer)
    ):
        raise DataError(f"A multitask batch needs task, integers of shape {rewards.shape[:1]}.")

    column = jnp.asarray(task)[:, None] if config.multitask else None
    is_first = jnp.asarray(batch.get("is_first", jnp.zeros(rewards.shape))).astype(jnp.float32)
    weights = _rollout_weights(is_first, config.horizon)
    obs = observations if isinstance(config.obs_shape, Mapping) else observations[OBS]
    return TrainBatch(obs, actions.astype(jnp.float32), rewards, terminated, weights, column)


def prepare_observations(config: TDMPC2Config, obs: Any) -> tuple[Observation, tuple[int, ...]]:
    """Check observations, and return what the encoder takes, with their leading axes.

    Args:
      config: names and shapes.
      obs: [..., *obs_shape], or a dict of such arrays with the same leading axes where ``config.obs_shape`` is one.

    Returns:
      The array, or arrays by name in the config's order; vectors of several axes are flattened.

    Raises:
      DataError: a name is missing, or an array has another shape, or is an image of integers other than uint8.
    """
    given, prepared, leads = _by_name(config, obs), {}, {}
    for name, shape in config.observations.items():
        array, what = jnp.asarray(given[name]), _what(config, name)
        axes = max(array.ndim - len(shape), 0)
        if array.shape[axes:] != shape:
            needed = ", ".join(map(str, ("...", *shape)))
            raise DataError(f"{what} have shape {array.shape}; the model takes [{needed}].")
        if len(shape) == 3 and array.dtype != jnp.uint8 and not jnp.issubdtype(array.dtype, jnp.floating):
            raise DataError(f"{what} are images of dtype {array.dtype}; use uint8 (0–255) or floats from 0 to 1.")
        leads[name] = array.shape[:axes]
        prepared[name] = array if len(shape) in (1, 3) else array.reshape(*leads[name], math.prod(shape))
    if len(set(leads.values())) > 1:
        raise DataError(f"The entries of obs have different leading axes: {leads}.")
    return prepared if isinstance(config.obs_shape, Mapping) else prepared[OBS], next(iter(leads.values()))


def check_batch_axis(config: TDMPC2Config, obs: Any) -> None:
    """Raise ``DataError`` unless observations are those of B environments, with one axis before their shape."""
    given, is_mapping = _by_name(config, obs), isinstance(config.obs_shape, Mapping)
    for name, shape in config.observations.items():
        found = jnp.asarray(given[name]).shape
        if len(found) != 1 + len(shape):
            single = "an axis of length 1 before each entry" if is_mapping else "obs[None]"
            raise DataError(
                f"{_what(config, name)} have shape {found}; act takes those of B environments, "
                f"[{', '.join(map(str, ('B', *shape)))}]. For a single one: {single}, and action[0]."
            )


def cut(obs: Any, rows: slice) -> Any:
    """``obs[:, rows]`` of an array [B, T, ...] or of each array of a dict."""
    return jax.tree.map(lambda x: x[:, rows], obs)


def _by_name(config: TDMPC2Config, obs: Any) -> Mapping[str, Any]:
    # What the config declares as one array must be one, what it declares as a mapping must have exactly its names.
    if not isinstance(config.obs_shape, Mapping):
        if isinstance(obs, Mapping):
            raise DataError(f"obs must be one array for this config, not a dict of {', '.join(map(str, obs))}.")
        return {OBS: obs}
    if not isinstance(obs, Mapping) or set(obs) != set(config.observations):
        found = f"one of {', '.join(map(str, obs))}" if isinstance(obs, Mapping) else f"a {type(obs).__name__}"
        raise DataError(f"obs must be a dict with the names {', '.join(config.observations)}, not {found}.")
    return obs


def _what(config: TDMPC2Config, name: str) -> str:
    return f"Observations '{name}'" if isinstance(config.obs_shape, Mapping) else "Observations"


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
