"""Between the arrays of the public methods and those of the networks: checks, layout, names, one-hot actions.

Inside, observations and actions are dicts by name; a single array is called ``obs`` or ``action``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from worldloom.errors import DataError
from worldloom.models.dreamer.config import ActionSpace, DreamerV3Config
from worldloom.ops.symlog import symexp
from worldloom.spaces import ACTION, OBS


def prepare_observations(config: DreamerV3Config, obs: Any, batch_axes: int) -> dict[str, jax.Array]:
    """Check observations and return them by name: vectors [..., n] flattened, images [..., H, W, C] channels last.

    Args:
      config: names and shapes.
      obs: one array, or a mapping where ``config.obs_shape`` is one.
      batch_axes: leading axes of every array (1 for [B, ...], 2 for [B, T, ...]).

    Raises:
      DataError: a name is missing, or an array has another shape or an integer dtype that is not uint8.
    """
    given = _by_name(obs, list(config.observations), config.obs_shape, OBS)
    prepared = {}
    for name, shape in config.observations.items():
        array = jnp.asarray(given[name])
        label = f" '{name}'" if isinstance(config.obs_shape, Mapping) else ""
        if array.ndim != batch_axes + len(shape) or array.shape[batch_axes:] != shape:
            axes = "one batch axis" if batch_axes == 1 else f"{batch_axes} batch axes"
            alone = batch_axes == 1 and array.shape == shape
            single = " For a single environment: obs[None], and action[0]." if alone else ""
            raise DataError(f"obs{label} has shape {array.shape}; {axes} followed by {shape} are expected.{single}")
        batch = array.shape[:batch_axes]
        if len(shape) < 3:
            prepared[name] = array.reshape(*batch, math.prod(shape))
            continue
        if array.dtype != jnp.uint8 and not jnp.issubdtype(array.dtype, jnp.floating):
            raise DataError(f"Image{label} has dtype {array.dtype}; use uint8 (0–255) or a float from 0 to 1.")
        prepared[name] = jnp.moveaxis(array, -3, -1) if config.image_layout(name)[3] else array
    return prepared


def restore_observations(config: DreamerV3Config, decoded: Mapping[str, jax.Array]) -> Any:
    """Decoder outputs in the units and layout of the data: the inverse of :func:`prepare_observations`.

    Vectors leave symlog space; images stay from 0 to 1 and get the axis order of ``obs_shape``. A single observation
    is returned as an array.
    """
    restored = {}
    for name, shape in config.observations.items():
        array = decoded[name]
        if len(shape) < 3:
            restored[name] = symexp(array).reshape(*array.shape[:-1], *shape)
        else:
            restored[name] = jnp.moveaxis(array, -1, -3) if config.image_layout(name)[3] else array
    return restored if isinstance(config.obs_shape, Mapping) else restored[OBS]


def embed_actions(config: DreamerV3Config, actions: Any, batch_axes: int, dtype: jnp.dtype) -> jax.Array:
    """Actions concatenated in sorted order of their names, [..., A]; discrete ones as one-hot vectors.

    Discrete actions may be given as indices [...] (−1 embeds as zeros) or as one-hot vectors [..., n].

    Raises:
      DataError: a name is missing, or an array has another shape or dtype.
    """
    given = _by_name(actions, list(config.actions), config.action_dim, "actions")
    embedded = [_embed(name, given[name], config.actions[name], batch_axes, dtype) for name in sorted(given)]
    return jnp.concatenate(embedded, -1)


def unwrap_single_action(config: DreamerV3Config, actions: Mapping[str, Any]) -> Any:
    """The actions as ``config`` declares them: by name, or the array itself where ``action_dim`` is a number."""
    return dict(actions) if isinstance(config.action_dim, Mapping) else actions[ACTION]


def _by_name(value: Any, names: list[str], declared: Any, what: str) -> dict[str, Any]:
    # What the config declares as one array must be one, what it declares as a mapping must have exactly its names.
    if not isinstance(declared, Mapping):
        if isinstance(value, Mapping) or not hasattr(value, "shape"):
            raise DataError(f"{what} must be one array for this config, not a {type(value).__name__}.")
        return {names[0]: value}
    if not isinstance(value, Mapping) or set(value) != set(names):
        found = list(value) if isinstance(value, Mapping) else type(value).__name__
        raise DataError(f"{what} must be a dict with the names {names}, not {found}.")
    return dict(value)


def _embed(name: str, action: Any, space: ActionSpace, batch_axes: int, dtype: jnp.dtype) -> jax.Array:
    action = jnp.asarray(action)
    if space.discrete and action.ndim == batch_axes:
        if not jnp.issubdtype(action.dtype, jnp.integer):
            raise DataError(f"Discrete action '{name}' has dtype {action.dtype}; give integers or one-hot vectors.")
        return jax.nn.one_hot(action, space.dim, dtype=dtype)
    if action.ndim != batch_axes + 1 or action.shape[-1] != space.dim:
        expected = f"{batch_axes} batch axes" + (" alone (indices) or" if space.discrete else "")
        raise DataError(f"Action '{name}' has shape {action.shape}; {expected} followed by ({space.dim},) is expected.")
    return action.astype(dtype)
