"""What an environment in JAX is: pure functions of one environment, to be jitted and vmapped."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from worldloom.config import is_integer
from worldloom.errors import ConfigError, EnvContractError


class JaxEnv(Protocol):
    """One environment as pure functions; any object with these methods and attributes will do.

    There is no automatic reset: whoever steps it resets it once ``terminated`` or ``truncated`` is true.

    Attributes:
      obs_shape: shape of an observation, or a dict of shapes by name. uint8 is 0–255; everything else becomes float32.
      action_dim: entries A of a continuous action, or the number of discrete ones.
      action_type: ``"continuous"``, float32 [A] in [−1, 1], or ``"discrete"``, int32 [].
      time_limit: steps after which whoever steps the environment truncates the episode; None for no limit.
    """

    obs_shape: Any
    action_dim: int
    action_type: str
    time_limit: int | None

    def reset(self, key: jax.Array) -> tuple[Any, Any]:
        """``(state, obs)`` of a new episode; ``state`` is any pytree of arrays."""

    def step(
        self, key: jax.Array, state: Any, action: jax.Array
    ) -> tuple[Any, Any, jax.Array, jax.Array, jax.Array, Mapping[str, Any]]:
        """``(state, obs, reward, terminated, truncated, info)`` after ``action``; ``info`` holds numbers by name."""


class Spec(NamedTuple):
    """Shapes and dtypes of what an environment returns, from abstract evaluation.

    Attributes:
      state: of a state.
      obs: of an observation, as the environment returns it.
      info: of the scalars in ``info``, by name.
    """

    state: Any
    obs: Any
    info: dict[str, jax.ShapeDtypeStruct]


def example_action(env: JaxEnv) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one action of ``env``."""
    if env.action_type == "continuous":
        return jax.ShapeDtypeStruct((env.action_dim,), jnp.float32)
    return jax.ShapeDtypeStruct((), jnp.int32)


def check_jax_env(env: JaxEnv) -> Spec:
    """The :class:`Spec` of ``env``, by tracing its functions once.

    Raises ``ConfigError`` for attributes out of range, ``EnvContractError`` for functions that return something else
    than :class:`JaxEnv` says. What the functions themselves raise is raised as it is.
    """
    name = type(env).__name__
    if env.action_type not in ("continuous", "discrete"):
        raise ConfigError(f"{name}.action_type must be 'continuous' or 'discrete', not {env.action_type!r}.")
    for field in ("action_dim", "time_limit"):
        value = getattr(env, field)
        if not (is_integer(value) and value >= 1) and not (field == "time_limit" and value is None):
            raise ConfigError(f"{name}.{field} must be an integer ≥ 1, not {value!r}.")
    key = jax.eval_shape(jax.random.key, 0)
    begun = jax.eval_shape(env.reset, key)
    if not isinstance(begun, tuple) or len(begun) != 2:
        raise EnvContractError(f"{name}.reset returned {_kind(begun)}; a tuple (state, obs) is needed.")
    state, obs = begun
    stepped = jax.eval_shape(functools.partial(step, env), key, state, example_action(env))
    for what, before, after in (("state", state, stepped[0]), ("obs", obs, stepped[1])):
        if _shapes(before) != _shapes(after):
            raise EnvContractError(
                f"{name}.reset and {name}.step return another {what}: {_shapes(before)!s:.300} and "
                f"{_shapes(after)!s:.300}. Structure, shapes and dtypes must be the same."
            )
    for what, value in zip(("reward", "terminated", "truncated"), stepped[2:5], strict=True):
        if getattr(value, "shape", None) != ():
            raise EnvContractError(f"{name}.step returned {what} = {_kind(value)}; one number is needed.")
    for what, value in zip(("terminated", "truncated"), stepped[3:5], strict=True):
        if value.dtype != jnp.bool_:
            raise EnvContractError(f"{name}.step returned {what} of dtype {value.dtype}; a boolean is needed.")
    declared = dict(env.obs_shape) if isinstance(env.obs_shape, Mapping) else tuple(env.obs_shape)
    found = {k: v.shape for k, v in obs.items()} if isinstance(obs, Mapping) else getattr(obs, "shape", None)
    if declared != found:
        raise EnvContractError(f"{name}.obs_shape is {declared}; reset returned an observation of shape {found}.")
    return Spec(state, obs, stepped[5])


def step(env: JaxEnv, key: jax.Array, state: Any, action: jax.Array) -> tuple[Any, ...]:
    """``env.step``, with the numbers of its ``info`` alone. Raises ``EnvContractError`` for anything but six values."""
    answer = env.step(key, state, action)
    if not isinstance(answer, tuple) or len(answer) != 6:
        raise EnvContractError(
            f"{type(env).__name__}.step returned {_kind(answer)}; a tuple (state, obs, reward, terminated, truncated, "
            "info) is needed."
        )
    *values, info = answer
    return *values, numbers(info)


def numbers(info: Any) -> dict[str, jax.Array]:
    """The scalars of an ``info`` as float32, those in dicts under ``outer/inner``; everything else is left out."""
    found: dict[str, jax.Array] = {}
    for name, value in dict(info or {}).items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in numbers(value).items()}
        elif isinstance(value, jax.Array | np.generic | int | float) and np.ndim(value) == 0 and _is_number(value):
            found[str(name)] = jnp.asarray(value, jnp.float32)
    return found


def _is_number(value: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jnp.number) or jnp.result_type(value) == jnp.bool_


def _shapes(tree: Any) -> list[str]:
    """Path, dtype and shape of each leaf. A list: classes of states need not accept texts in place of arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves]


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"an array of shape {shape}"
