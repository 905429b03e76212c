"""A world model as Gymnasium environments: one at a time, or many in one compiled call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from worldloom.config import as_integer
from worldloom.envs.imagined_world import ImaginedWorld
from worldloom.errors import ConfigError, EnvError
from worldloom.spaces.actions import ActionSpec

_ID, _KEYS = "worldloom/Imagined-v0", 2**32


class ImaginedEnv(gym.Env[Any, Any]):
    """A world model as a Gymnasium environment::

        env = ImaginedEnv(model, replay, horizon=15)
        obs, info = env.reset(seed=0)
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())

    Arguments, errors, and what observations, rewards and ends of episodes are: see
    :class:`worldloom.envs.imagined_world.ImaginedWorld`; the attribute ``world`` is one, and has the same as pure
    functions for JAX. ``ImaginedEnv(world)`` shares it. ``make_env`` takes an ``ImaginedEnv`` like any other
    environment; for more than one use :class:`ImaginedVectorEnv`, which imagines all of them in one compiled call.

    ``reset`` takes new weights of the model into account; an episode is imagined with the weights that it began with.
    ``reset(options={"start": i})`` starts from state i of ``world.params.starts``. ``info["continue"]`` is the
    probability that the episode does not terminate at this observation, 1.0 at the first.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's name, never written to

    def __init__(self, model: Any, start: Any = None, **options: Any):
        self.world = _world(model, start, options)
        self.spec = EnvSpec(
            _ID, functools.partial(ImaginedEnv, self.world), max_episode_steps=self.world.horizon, order_enforce=False
        )
        self.observation_space, self.action_space = self.world.observation_space, self.world.action_space
        self._actions = ActionSpec(self.action_space)
        self._reset, self._step = _compiled(self.world.reset, self.world.step)
        self._params: Any = None
        self._state: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode. Raises ``ConfigError`` for a start that does not exist."""
        super().reset(seed=seed)
        start = (options or {}).get("start")
        if start is not None and not 0 <= start < self.world.num_starts:
            raise ConfigError(f"options['start'] is {start!r}; there are the starts 0 to {self.world.num_starts - 1}.")
        self._params = self.world.params
        key = jax.random.key(int(self.np_random.integers(_KEYS)))
        self._state, obs = self._reset(self._params, key, None if start is None else jnp.int32(start))
        return _copied(obs), {"continue": 1.0}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Imagine one step.

        Raises ``EnvError`` before the first reset, ``DataError`` for an action of another shape or out of range.
        """
        if self._state is None:
            raise EnvError("Call reset before step.")
        batch = jax.tree.map(lambda x: np.asarray(x)[None], action)
        native = _native(self._actions, batch, 1)
        self._state, out = self._step(self._params, self._state, jax.tree.map(lambda x: x[0], native))
        out = jax.device_get(out)
        info = {"continue": float(out.continues)}
        return _copied(out.obs), float(out.reward), bool(out.terminated), bool(out.truncated), info


class ImaginedVectorEnv(gym.vector.VectorEnv[Any, Any, Any]):
    """N environments imagined together, as a Gymnasium vector environment in the autoreset mode ``NEXT_STEP``.

    The step after an episode's end ignores the action of that environment and returns the first observation of its next
    episode with reward 0. ``make_env(ImaginedVectorEnv(...))`` is a :class:`worldloom.envs.VectorEnv` of it, to train
    or evaluate on.

    Args:
      model: a model, as for :class:`worldloom.envs.imagined_world.ImaginedWorld`, or one of these alone.
      start: as there.
      num_envs: N.
      **options: as there.

    ``reset`` takes new weights of the model into account; steps use those of the last reset.
    ``infos["continue"]`` [N] is the probability that the episode does not terminate at this observation.
    """

    def __init__(self, model: Any, start: Any = None, num_envs: int = 1, **options: Any):
        num_envs = as_integer("num_envs", num_envs)
        self.world, self.num_envs = _world(model, start, options), num_envs
        self.spec = EnvSpec(_ID, max_episode_steps=self.world.horizon)
        self.metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}
        self.single_observation_space = self.world.observation_space
        self.single_action_space = self.world.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._actions = ActionSpec(self.single_action_space)
        self._reset, self._step = _compiled_vector(self.world.reset, self.world.step)
        self._params: Any = None
        self._state: Any = None
        self._over = np.zeros(num_envs, bool)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode in every environment.

        Raises ``ConfigError`` for a list of seeds or the option ``reset_mask``: all environments draw from one key.
        """
        if isinstance(seed, list) or "reset_mask" in (options or {}):
            raise ConfigError("Imagined environments are reset together, with one integer seed or None.")
        super().reset(seed=seed)
        self._params = self.world.params
        self._state, obs = self._reset(self._params, self._keys())
        self._over = np.zeros(self.num_envs, bool)
        return _copied(obs), {"continue": np.ones(self.num_envs, np.float32)}

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Imagine one step of every environment; those whose episode is over start the next one.

        Raises ``EnvError`` before the first reset, ``DataError`` for actions of another shape or out of range.
        """
        if self._state is None:
            raise EnvError("Call reset before step.")
        native = _native(self._actions, actions, self.num_envs, self._over)
        self._state, out = self._step(self._params, self._state, native, self._over, self._keys())
        out = jax.device_get(out)
        self._over = out.terminated | out.truncated
        reward = out.reward.astype(np.float64)
        return _copied(out.obs), reward, out.terminated.copy(), out.truncated.copy(), {"continue": out.continues}

    def _keys(self) -> jax.Array:
        return jax.random.split(jax.random.key(int(self.np_random.integers(_KEYS))), self.num_envs)


def _world(model: Any, start: Any, options: dict[str, Any]) -> ImaginedWorld:
    if not isinstance(model, ImaginedWorld):
        return ImaginedWorld(model, start, **options)
    if start is not None or options:
        raise TypeError("An ImaginedWorld has its start and options already; give it alone.")
    return model


# Jitted functions are kept with what they compile, so that equal environments do not compile again.
@functools.lru_cache(maxsize=64)
def _compiled(reset: Callable[..., Any], step: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return jax.jit(reset), jax.jit(step)


@functools.lru_cache(maxsize=64)
def _compiled_vector(
    reset: Callable[..., Any], step: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``(params, keys [N]) -> (state, obs)`` and ``(params, state, actions, over [N], keys) -> (state, step)``."""

    def one(params: Any, state: Any, action: Any, over: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        stepped, out = step(params, state, action)
        fresh, first = reset(params, key)
        # Both are computed, and one of them taken: under vmap there are no branches.
        state = jax.tree.map(lambda new, old: jnp.where(over, new, old), fresh, stepped)
        obs = jax.tree.map(lambda new, old: jnp.where(over, new, old), first, out.obs)
        out = out._replace(
            obs=obs,
            reward=jnp.where(over, 0.0, out.reward),
            terminated=out.terminated & ~over,
            truncated=out.truncated & ~over,
            continues=jnp.where(over, 1.0, out.continues),
        )
        return state, out

    return jax.jit(jax.vmap(reset, (None, 0))), jax.jit(jax.vmap(one, (None, 0, 0, 0, 0)))


def _native(spec: ActionSpec, actions: Any, count: int, over: np.ndarray | None = None) -> Any:
    """Checked actions [N, ...]: float32 within [−1, 1], or int32 classes. Raises ``DataError`` for others."""
    checked = spec.check(actions, ignore=np.zeros(count, bool) if over is None else over)
    native = spec.to_env(checked)
    return jax.tree.map(lambda x: x.astype(np.int32) if x.dtype.kind == "i" else x, native)


def _copied(obs: Any) -> Any:
    """Arrays on the host that may be written to, which those of JAX may not."""
    return jax.tree.map(np.array, obs)
