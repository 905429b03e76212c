"""Environments in JAX by name, and the two changes that ``make_env`` makes to them: action repeat and time limit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from worldloom.config import check, nearest
from worldloom.envs.jax import packages
from worldloom.envs.jax.backend import JaxBackend, is_hashable
from worldloom.envs.jax.catch import Catch
from worldloom.envs.jax.classic import Acrobot, CartPole, MountainCarContinuous, Pendulum
from worldloom.envs.jax.protocol import JaxEnv, check_jax_env, step
from worldloom.errors import ConfigError

OWN: dict[str, Callable[..., Any]] = {
    "Pendulum-v1": Pendulum,
    "CartPole-v1": CartPole,
    "Acrobot-v1": Acrobot,
    "MountainCarContinuous-v0": MountainCarContinuous,
    "Catch-v0": Catch,
}
"""The environments of this package, named like Gymnasium's where they equal one."""

_ADAPTERS: dict[str, Callable[..., JaxEnv]] = {
    "gymnax": packages.make_gymnax,
    "craftax": packages.make_craftax,
    "brax": packages.make_brax,
    "playground": packages.make_playground,
    "navix": packages.make_navix,
    "jumanji": packages.make_jumanji,
}


_TRUNCATE_THEMSELVES = ("gymnax", "craftax", "navix", "jumanji")
"""Suites whose environments end an episode at their own limit, whatever limit is given here."""


def make_jax_env(spec: str, **options: Any) -> JaxEnv:
    """The environment ``spec``: ``"jax:Pendulum-v1"``, ``"gymnax:CartPole-v1"``, ``"craftax:Classic-Symbolic"``.

    Equal arguments return the same object, so that programs compiled for it are used again.

    Raises ``ConfigError`` for names and options that do not exist, and what the other package raises for its own.
    """
    try:
        return _make(spec, tuple(sorted(options.items())))
    except TypeError as error:
        if "unhashable" in str(error):
            return _build(spec, options)
        raise


@functools.lru_cache(maxsize=64)
def _make(spec: str, options: tuple[tuple[str, Any], ...]) -> JaxEnv:
    return _build(spec, dict(options))


def _build(spec: str, options: dict[str, Any]) -> JaxEnv:
    prefix, _, name = spec.partition(":")
    if prefix != "jax":
        return _ADAPTERS[prefix](name, **options)
    if name not in OWN:
        raise ConfigError(
            f"'{spec}' is no environment; there are {', '.join(f'jax:{n}' for n in OWN)}.{nearest(name, OWN)}"
        )
    try:
        return OWN[name](**options)
    except TypeError as error:
        raise ConfigError(f"{spec} cannot be made with {options}: {error}.") from error


def make_backend(
    spec: Any, num_envs: int, *, action_repeat: int, time_limit: int | None, render: bool, options: dict[str, Any]
) -> JaxBackend:
    """The backend of ``make_env`` for a spec or an object, with its arguments of the same names."""
    env: Any = make_jax_env(spec, **options) if isinstance(spec, str) else spec
    limit = env.time_limit if time_limit is None else time_limit
    own = env.time_limit if isinstance(spec, str) and spec.partition(":")[0] in _TRUNCATE_THEMSELVES else None
    check(
        own is None or limit is None or limit <= own,
        f"{spec} ends its episodes after {own} steps itself, so time_limit={limit} cannot lengthen them.",
    )
    if not isinstance(spec, str) and env.time_limit is not None and limit is not None:
        limit = min(limit, env.time_limit)
    if action_repeat > 1:
        check_jax_env(env)  # While errors name the environment, and not what repeats its actions.
        env = (_repeated if is_hashable(env) else Repeat)(env, action_repeat, limit)
    return JaxBackend(env, num_envs, time_limit=limit, action_repeat=action_repeat, render=render)


class RepeatState(NamedTuple):
    """``inner``, the state of the environment, and ``steps`` taken in this episode, int32 []."""

    inner: Any
    steps: jax.Array


class Repeat:
    """An environment in which every action is taken ``repeat`` times, or until the episode is over; rewards are summed.

    Args:
      env: the environment.
      repeat: at least 1.
      time_limit: steps of ``env`` after which an episode is truncated, or None.
    """

    def __init__(self, env: JaxEnv, repeat: int, time_limit: int | None):
        self.env, self.repeat, self.time_limit = env, repeat, time_limit
        self.obs_shape, self.action_dim, self.action_type = env.obs_shape, env.action_dim, env.action_type

    def reset(self, key: jax.Array) -> tuple[RepeatState, Any]:
        """See :class:`JaxEnv`."""
        state, obs = self.env.reset(key)
        return RepeatState(state, jnp.zeros((), jnp.int32)), obs

    def step(self, key: jax.Array, state: RepeatState, action: jax.Array) -> tuple[Any, ...]:
        """See :class:`JaxEnv`."""

        def once(number: Any, before: tuple[Any, ...]) -> tuple[Any, ...]:
            (inner, steps), _, total, terminated, truncated, _ = before
            key_of_step = jax.random.fold_in(key, number)
            inner, obs, reward, ended, cut, info = step(self.env, key_of_step, inner, action)
            cut = cut if self.time_limit is None else cut | (steps + 1 >= self.time_limit)
            after = (RepeatState(inner, steps + 1), obs, total + reward.astype(jnp.float32), ended, cut, info)
            over = terminated | truncated
            return jax.tree.map(lambda new, old: jnp.where(over, old, new), after, before)

        shapes = jax.eval_shape(functools.partial(step, self.env), key, state.inner, action)
        empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[1], shapes[5]))
        false = jnp.asarray(False)
        return jax.lax.fori_loop(0, self.repeat, once, (state, empty[0], jnp.zeros(()), false, false, empty[1]))


@functools.lru_cache(maxsize=64)
def _repeated(env: Any, repeat: int, time_limit: int | None) -> Repeat:
    return Repeat(env, repeat, time_limit)
