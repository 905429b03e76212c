"""What an environment in JAX is: pure functions of one environment, to be jitted and vmapped."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from worldloom.config import is_integer
from worldloom.errors import ConfigError, EnvContractError
from worldloom.spaces import OBS


class JaxEnv(Protocol):
    """One environment as pure functions; any object with these methods and attributes will do.

    There is no automatic reset: whoever steps it resets it once ``terminated`` or ``truncated`` is true.

    Attributes:
      obs_shape: shape of an observation, or a dict of shapes by name. Three axes are a picture, uint8 from 0 to 255 or
        float from 0 to 1; uint8 of two axes is one too, without colours; everything else becomes a float32 vector.
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

    Raises ``ConfigError`` for attributes out of range, ``EnvContractError`` for functions that take or return something
    else than :class:`JaxEnv` says. What the functions themselves raise is raised as it is.
    """
    name = type(env).__name__
    declared = _check_attributes(env, name)
    key = jax.eval_shape(jax.random.key, 0)
    state, obs = jax.eval_shape(functools.partial(_reset, env), key)
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
        allowed = "a boolean" if what != "reward" else "a real number"
        if not (value.dtype == jnp.bool_ or (what == "reward" and _is_real(value.dtype))):
            raise EnvContractError(f"{name}.step returned {what} of dtype {value.dtype}; {allowed} is needed.")
    _check_observation(name, declared, obs)
    return Spec(state, obs, stepped[5])


def _check_attributes(env: Any, name: str) -> Any:
    """The declared shape, as tuples. Raises ``ConfigError`` for attributes out of range."""
    if env.action_type not in ("continuous", "discrete"):
        raise ConfigError(f"{name}.action_type must be 'continuous' or 'discrete', not {env.action_type!r}.")
    for field in ("action_dim", "time_limit"):
        value = getattr(env, field)
        if not (is_integer(value) and 1 <= value < 2**31) and not (field == "time_limit" and value is None):
            below = " and below 2^31" if is_integer(value) and value >= 1 else ""
            raise ConfigError(f"{name}.{field} must be an integer ≥ 1{below}, not {value!r}.")
    for method, arguments in (("reset", "(key)"), ("step", "(key, state, action)")):
        function = getattr(env, method)
        if not callable(function):
            raise ConfigError(f"{name}.{method} must be a function of {arguments}, not {function!r:.100}.")
        if not takes(function, arguments.count(",") + 1):
            raise ConfigError(f"{name}.{method} must take {arguments}; it takes {inspect.signature(function)}.")

    def shape(value: Any) -> tuple[int, ...]:
        sizes = tuple(value) if isinstance(value, tuple | list) else (-1,)
        if not all(is_integer(size) and size >= 1 for size in sizes):
            raise ConfigError(
                f"{name}.obs_shape must be a shape such as (4,) or (64, 64, 3), or a dict of them by name, not "
                f"{env.obs_shape!r:.100}."
            )
        return tuple(int(size) for size in sizes)

    given = env.obs_shape
    return {key: shape(each) for key, each in given.items()} if isinstance(given, Mapping) else shape(given)


def _check_observation(name: str, declared: Any, obs: Any) -> None:
    """Raise ``EnvContractError`` unless ``obs`` has the declared shape, and is what models can be given."""
    arrays = obs if isinstance(obs, Mapping) else {OBS: obs}
    for key, leaf in arrays.items():
        if not isinstance(key, str) or not hasattr(leaf, "dtype"):
            kind = f"{type(leaf).__name__} {key!r}" if isinstance(obs, Mapping) else _kind(obs)
            raise EnvContractError(
                f"{name}.reset returned the observation {kind}; an array is needed, or a dict of arrays by name, "
                "without further dicts or tuples in it."
            )
        where = f"{name}.reset returned the observation '{key}' of shape {leaf.shape} and dtype {leaf.dtype}"
        if leaf.dtype != jnp.bool_ and not _is_real(leaf.dtype):
            raise EnvContractError(f"{where}; real numbers are needed.")
        if len(leaf.shape) > 3:
            raise EnvContractError(f"{where}; pictures have three axes and vectors one: reshape it to (-1,).")
        if len(leaf.shape) == 3 and jnp.issubdtype(leaf.dtype, jnp.integer) and leaf.dtype != jnp.uint8:
            raise EnvContractError(
                f"{where}; a picture is uint8 from 0 to 255 or float from 0 to 1. What is no picture is a vector: "
                "reshape it to (-1,)."
            )
    found = {key: leaf.shape for key, leaf in obs.items()} if isinstance(obs, Mapping) else obs.shape
    if declared != found:
        raise EnvContractError(f"{name}.obs_shape is {declared}; reset returned an observation of shape {found}.")


def takes(function: Any, count: int) -> bool:
    """Whether ``function`` can be called with ``count`` positional arguments, as far as it tells."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # It has no signature that Python can read.
        return True
    return True


def _reset(env: JaxEnv, key: jax.Array) -> tuple[Any, Any]:
    """``env.reset``. Raises ``EnvContractError`` for anything but two values of arrays."""
    name, begun = type(env).__name__, env.reset(key)
    if not isinstance(begun, tuple) or len(begun) != 2:
        raise EnvContractError(f"{name}.reset returned {_kind(begun)}; a tuple (state, obs) is needed.")
    check_arrays(f"{name}.reset", state=begun[0], obs=begun[1])
    return begun[0], begun[1]


def step(env: JaxEnv, key: jax.Array, state: Any, action: jax.Array) -> tuple[Any, ...]:
    """``env.step``, with the numbers of its ``info`` alone.

    Raises ``EnvContractError`` for anything but six values of arrays and numbers.
    """
    answer = env.step(key, state, action)
    if not isinstance(answer, tuple) or len(answer) != 6:
        raise EnvContractError(
            f"{type(env).__name__}.step returned {_kind(answer)}; a tuple (state, obs, reward, terminated, truncated, "
            "info) is needed."
        )
    state, obs, *values, info = answer
    name = f"{type(env).__name__}.step"
    check_arrays(name, state=state, obs=obs, **dict(zip(("reward", "terminated", "truncated"), values, strict=True)))
    if info is not None and not isinstance(info, Mapping):
        raise EnvContractError(f"{name} returned info = {_kind(info)}; a dict of numbers by name is needed, or None.")
    # A structure in place of a number is left to whoever checks the answer.
    return state, obs, *(jax.tree.map(jnp.asarray, value) for value in values), numbers(info or {})


def numbers(info: Mapping[Any, Any]) -> dict[str, jax.Array]:
    """The scalars of an ``info`` as float32, those in dicts under ``outer/inner``; everything else is left out."""
    found: dict[str, jax.Array] = {}
    for name, value in info.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in numbers(value).items()}
        elif _is_array(value) and np.ndim(value) == 0 and _is_number(value):
            found[str(name)] = jnp.asarray(value, jnp.float32)
    return found


def check_arrays(source: str, **trees: Any) -> None:
    """Raise ``EnvContractError`` for leaves of trees that are no arrays or numbers."""
    for what, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not _is_array(leaf):
                raise EnvContractError(
                    f"{source} returned a {type(leaf).__name__} in {what}{jax.tree_util.keystr(path)}; only arrays and "
                    "numbers can be compiled. A class of your own is a NamedTuple, or registered by "
                    "jax.tree_util.register_dataclass."
                )


def _is_array(value: Any) -> bool:
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind not in "OSUMm"  # objects, texts, times
    return isinstance(value, jax.Array | int | float | complex)


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)


def _is_number(value: Any) -> bool:
    return _is_real(jnp.result_type(value)) or jnp.result_type(value) == jnp.bool_


def _shapes(tree: Any) -> list[str]:
    """Path, dtype and shape of each leaf. A list: classes of states need not accept texts in place of arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves]


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"an array of shape {shape}"
