"""N environments stepped together in traced code: what the host path and the loop on the device have in common."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldloom.envs.jax.protocol import JaxEnv, step

Array = Any
"""An array on the device, or one of NumPy where the host fills it."""


class EnvBatch(NamedTuple):
    """N environments between two steps.

    Attributes:
      state: their states, [N, ...].
      seeds: seed of each episode, uint32 [N].
      steps: steps taken in each episode, int32 [N].
    """

    state: Any
    seeds: Array
    steps: Array


class Arrival(NamedTuple):
    """A row of each environment; everything belongs to arriving at ``obs``.

    Attributes:
      obs: [N, ...], or a dict of such arrays.
      reward: float32 [N]; 0 where an episode begins.
      is_last: bool [N], the episode ends here, for whatever reason.
      is_terminal: bool [N], the environment itself ended it.
      info: the numbers in ``info``, float32 [N] by name; 0 where an episode begins.
    """

    obs: Any
    reward: Array
    is_last: Array
    is_terminal: Array
    info: dict[str, Array]


def reset(env: JaxEnv, seeds: jax.Array) -> tuple[EnvBatch, Any]:
    """Begin the episodes with ``seeds`` uint32 [N]; returns the batch and the first observations."""
    state, obs = jax.vmap(lambda seed: env.reset(_key(seed, 0)))(seeds)
    return EnvBatch(state, seeds, jnp.zeros(seeds.shape, jnp.int32)), jax.vmap(observations)(obs)


def advance(
    env: JaxEnv, limit: int | None, batch: EnvBatch, actions: jax.Array, over: jax.Array, seeds: jax.Array
) -> tuple[EnvBatch, Arrival]:
    """Step the environments, and begin the next episodes in those where ``over``.

    The draws of step n of an episode are a function of its seed and n alone.

    Args:
      env: the environment.
      limit: steps after which an episode is truncated, or None.
      batch: the environments.
      actions: float32 [N, A] or int32 [N]; ignored where ``over``.
      over: bool [N].
      seeds: uint32 [N], of the next episodes.
    """
    batch, actions = jax.lax.optimization_barrier((batch, actions))
    steps = batch.steps + 1
    keys = jax.vmap(_key)(batch.seeds, steps)
    state, obs, reward, terminated, truncated, info = jax.vmap(functools.partial(step, env))(keys, batch.state, actions)
    if limit is not None:
        truncated = truncated | (steps >= limit)
    obs = jax.vmap(observations)(obs)
    stepped = EnvBatch(state, batch.seeds, steps)
    # A reset is only computed when an episode has ended (under vmap over members: at every step).
    begun, first = jax.lax.cond(
        over.any(), lambda: _same_types(reset(env, seeds), (stepped, obs)), lambda: (stepped, obs)
    )
    batch, obs = jax.tree.map(lambda new, old: jnp.where(_like(over, old), new, old), (begun, first), (stepped, obs))
    arrival = Arrival(
        obs,
        jnp.where(over, 0.0, reward.astype(jnp.float32)),
        (terminated | truncated) & ~over,
        terminated & ~over,
        {name: jnp.where(over, 0.0, value) for name, value in info.items()},
    )
    # The barriers keep XLA from fusing the environment with what surrounds it: rounding must not depend on the loop.
    return jax.lax.optimization_barrier((batch, arrival))


def observations(obs: Any) -> Any:
    """The observation of one environment as models take it, by the rules of ``spaces.ObservationSpec``.

    Pictures have three axes and stay uint8, or become float32 from 0 to 1; uint8 of two axes gets a third. Everything
    else becomes a float32 vector, a single number one of length 1.
    """
    return {name: _observation(x) for name, x in obs.items()} if isinstance(obs, Mapping) else _observation(obs)


def _observation(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.uint8 and x.ndim > 1:
        return x if x.ndim == 3 else x[..., None]
    x = x.astype(jnp.float32)
    return x if x.ndim in (1, 3) else x.reshape(-1)


def flatten_state(batch: EnvBatch) -> dict[str, np.ndarray]:
    """``batch`` as NumPy arrays by name, for checkpoints; keys as their data."""
    leaves = [jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(batch)]
    return {str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)}


def unflatten_state(like: EnvBatch, arrays: Mapping[str, np.ndarray]) -> EnvBatch | None:
    """Inverse of :func:`flatten_state` for environments whose batch is ``like`` (shapes); None if they do not fit."""
    leaves, structure = jax.tree.flatten(like)
    found = []
    for i, leaf in enumerate(leaves):
        value = arrays.get(str(i))
        kept = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        # NumPy's files know bfloat16 only as so many bytes.
        if value is not None and value.dtype.kind == "V" and value.dtype.itemsize == kept.dtype.itemsize:
            value = value.view(kept.dtype)
        if value is None or value.shape != kept.shape or value.dtype != kept.dtype:
            return None
        array = jnp.asarray(value)
        found.append(jax.random.wrap_key_data(array, impl=_key_impl(leaf)) if _is_key(leaf) else array)
    return jax.tree.unflatten(structure, found) if len(arrays) == len(leaves) else None


def _key(seed: jax.Array, step: Any) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), step)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(like: Any) -> Any:
    """The implementation of keys of this shape and dtype, which JAX tells of arrays alone."""
    found: list[Any] = []
    jax.eval_shape(lambda keys: found.append(jax.random.key_impl(keys)), like)
    return found[0]


def _like(mask: jax.Array, value: jax.Array) -> jax.Array:
    """``mask`` [N] with further axes, to select rows of ``value`` [N, ...]."""
    return mask.reshape(mask.shape + (1,) * (value.ndim - 1))


def _same_types(values: Any, like: Any) -> Any:
    """``values`` without weak types, which both branches of a condition must agree on."""
    return jax.tree.map(
        lambda new, old: new if _is_key(new) else jax.lax.convert_element_type(new, old.dtype), values, like
    )
