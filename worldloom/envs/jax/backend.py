"""Environments in JAX as a backend of ``VectorEnv``: one compiled call steps all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from worldloom.envs.backends.base import BatchedStepResult
from worldloom.envs.jax.batch import EnvBatch, advance, flatten_state, observations, reset, unflatten_state
from worldloom.envs.jax.protocol import check_jax_env
from worldloom.errors import ConfigError, EnvError
from worldloom.spaces import OBS, named


class JaxBackend:
    """N environments in JAX, see :class:`worldloom.envs.backends.base.StatefulBackend`.

    Args:
      env: the environment, see :class:`~worldloom.envs.jax.protocol.JaxEnv`.
      num_envs: N.
      time_limit: steps after which an episode is truncated; None follows ``env.time_limit``.
      action_repeat: steps per action, which ``env`` takes itself; ``time_limit`` counts steps.
      render: whether :meth:`render` will be called.

    Attributes:
      env: see above.
      limit: actions after which an episode is truncated, or None.
      batch: the environments between two steps; None before the first reset.

    Raises what :func:`~worldloom.envs.jax.protocol.check_jax_env` raises, and ``EnvError`` for ``render`` if the
    observation is no image.
    """

    def __init__(
        self,
        env: Any,
        num_envs: int,
        *,
        time_limit: int | None = None,
        action_repeat: int = 1,
        render: bool = False,
    ):
        # Programs are kept by environment; an object that compares by value need not be hashable.
        self.env: Any = env if is_hashable(env) else _ByIdentity(env)
        self.num_envs = num_envs
        self.spec = check_jax_env(env)
        obs = jax.eval_shape(observations, self.spec.obs)
        members = {name: _space(leaf) for name, leaf in named(obs, OBS).items()}
        # From pairs: Gymnasium sorts the keys of a mapping.
        single = not isinstance(obs, Mapping)
        self.observation_space: Any = members[OBS] if single else spaces.Dict([*members.items()])
        continuous = env.action_type == "continuous"
        self.action_space: Any = (
            spaces.Box(-1, 1, (env.action_dim,), np.float32) if continuous else spaces.Discrete(env.action_dim)
        )
        self._action_dtype = np.dtype(np.float32 if continuous else np.int32)
        self._image = next((n for n, leaf in named(obs, OBS).items() if _is_image(leaf)), None)
        if render and self._image is None:
            raise EnvError(f"{type(env).__name__} draws no pictures.")
        self.time_limit = env.time_limit if time_limit is None else time_limit
        self.limit = None if self.time_limit is None else -(-self.time_limit // action_repeat)
        self.batch: EnvBatch | None = None
        self._obs: Any = None
        self._reset, self._advance = _compiled(self.env, self.limit)

    def step(self, actions: Any, reset_mask: np.ndarray, seeds: Sequence[int | None]) -> BatchedStepResult:
        """See :meth:`worldloom.envs.backends.base.Backend.step`."""
        numbers = np.array([seed or 0 for seed in seeds], np.uint32)
        if actions is None or self.batch is None:
            self.batch, obs = self._reset(numbers)
            self._obs = named(jax.device_get(obs), OBS)
            none = np.zeros(self.num_envs, bool)
            return BatchedStepResult(self._obs, np.zeros(self.num_envs, np.float32), none, none.copy())
        (chosen,) = actions.values()
        self.batch, arrival = self._advance(self.batch, chosen.astype(self._action_dtype), reset_mask, numbers)
        arrival = jax.device_get(arrival)
        self._obs = named(arrival.obs, OBS)
        infos = {
            env: {name: float(value[env]) for name, value in arrival.info.items() if np.isfinite(value[env])}
            for env in np.flatnonzero(arrival.is_last).tolist()
            if arrival.info
        }
        return BatchedStepResult(self._obs, arrival.reward, arrival.is_last, arrival.is_terminal, infos=infos)

    def save_state(self) -> dict[str, np.ndarray]:
        """The states of the environments, as arrays that :meth:`load_state` takes."""
        return {} if self.batch is None else flatten_state(self.batch)

    def load_state(self, arrays: Mapping[str, np.ndarray], obs: Mapping[str, np.ndarray]) -> bool:
        """Return to a saved state with the observations ``obs``; False if it is that of another environment."""
        like = jax.eval_shape(self._reset, jax.ShapeDtypeStruct((self.num_envs,), jnp.uint32))[0]
        batch = unflatten_state(like, arrays)
        if batch is None:
            return False
        self.batch, self._obs = batch, obs
        return True

    def replay_actions(self, seeds: Sequence[int], actions: Sequence[Any], lengths: np.ndarray) -> None:
        """Not needed: the states themselves are saved."""
        return None

    def render(self) -> Any:
        """The first image in the observation of environment 0, uint8 [H, W, 3]; ``NotImplementedError`` without one."""
        if self._image is None or self._obs is None:
            raise NotImplementedError
        return np.array(self._obs[self._image][0])

    def close(self) -> None:
        """Nothing to release."""


def is_hashable(env: Any) -> bool:
    """Whether ``env`` has a hash; frozen dataclasses of arrays only look as if they had."""
    try:
        hash(env)
    except TypeError:
        return False
    return True


class _ByIdentity:
    """Another object's attributes, hashable."""

    def __init__(self, env: Any):
        self._env = env

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)


def as_backend(env: Any) -> JaxBackend:
    """The backend of a ``VectorEnv`` of environments in JAX. Raises ``ConfigError`` for other environments."""
    backend = getattr(env, "_backend", None)
    if not isinstance(backend, JaxBackend):
        raise ConfigError(f"The environments are not in JAX: {env!r:.200}.")
    return backend


@functools.lru_cache(maxsize=64)
def _compiled(env: Any, limit: int | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    # Kept by environment, so that those made with ``another`` do not compile again.
    return jax.jit(functools.partial(reset, env)), jax.jit(functools.partial(advance, env, limit))


def _space(leaf: Any) -> spaces.Box:
    if leaf.dtype == jnp.uint8:
        return spaces.Box(0, 255, leaf.shape, np.uint8)
    # Nobody declares bounds: pictures of floats are from 0 to 1, as everywhere, which replay checks.
    low, high = (0, 1) if len(leaf.shape) == 3 else (-np.inf, np.inf)
    return spaces.Box(low, high, leaf.shape, np.float32)


def _is_image(leaf: Any) -> bool:
    return leaf.dtype == jnp.uint8 and len(leaf.shape) == 3 and leaf.shape[-1] == 3
