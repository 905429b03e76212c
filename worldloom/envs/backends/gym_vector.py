"""Gymnasium vector environments made by the user. All three autoreset modes give the same time steps.

An episode of n actions has n+1 rows, so there must be a call in which an environment whose episode is over is reset
and not stepped. The autoreset modes differ in when they reset an environment whose episode ends in step t:

``NEXT_STEP``
  in step t+1, whose action it ignores: what is needed here.
``SAME_STEP``
  in step t; the last observation is in ``info["final_obs"]``. In step t+1 the new episode is stepped with an ignored
  action, then reset.
``DISABLED``
  not at all. Before step t+1 it is reset, because a finished episode must not be stepped, then stepped with an ignored
  action, then reset.

So the last two modes cost an extra step and reset per episode. Resets of some environments among N use
``options={"reset_mask": ...}``.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from worldloom.envs.backends.base import BatchedStepResult
from worldloom.envs.contract import excluded, read_reset, read_vector_step
from worldloom.envs.time_step import scalars
from worldloom.errors import ConfigError, DataError, EnvContractError, EnvError
from worldloom.spaces.joined import JoinedActions
from worldloom.spaces.narrow import bound_actions, drop_observations
from worldloom.spaces.observations import ObservationSpec

_log = logging.getLogger("worldloom")


class CopyObservations(gym.ObservationWrapper[Any, Any, Any]):
    """Copies observations, for environments that write the next one into the same array."""

    def observation(self, observation: Any) -> Any:
        """A deep copy."""
        return copy.deepcopy(observation)


class GymVectorBackend:
    """A Gymnasium vector environment as a backend.

    Gymnasium's own ``SyncVectorEnv`` and ``AsyncVectorEnv`` are reset with a seed per episode. Others take one integer
    seed at the first reset and continue with their own random numbers.

    Args:
      env: the vector environment.
      action_bounds, drop_keys, join_actions: as in ``make_env``, checked; they change the spaces.

    Raises ``ConfigError`` if ``env.metadata["autoreset_mode"]`` is not an ``AutoresetMode``. The methods raise
    ``EnvContractError`` for what the spaces or Gymnasium's interface exclude.
    """

    def __init__(
        self,
        env: gym.vector.VectorEnv[Any, Any, Any],
        *,
        action_bounds: tuple[float, float] | None = None,
        drop_keys: Sequence[str] = (),
        join_actions: bool = False,
    ):
        mode = (env.metadata or {}).get("autoreset_mode")
        if not isinstance(mode, AutoresetMode):
            raise ConfigError(
                f"The vector environment's metadata['autoreset_mode'] is {mode!r}; it must be a "
                "gymnasium.vector.AutoresetMode, which tells where episodes end."
            )
        self._env: Any = env  # Gymnasium's annotations omit the seed lists that its vector environments accept.
        self._mode = mode
        self._seeds_per_episode = isinstance(env.unwrapped, SyncVectorEnv | AsyncVectorEnv)
        self.observation_space = drop_observations(env.single_observation_space, drop_keys)
        bounded = bound_actions(env.single_action_space, action_bounds)
        self._joined = JoinedActions(bounded) if join_actions else None
        self.action_space = bounded if self._joined is None else self._joined.space
        self._observations = ObservationSpec(self.observation_space)
        if mode is AutoresetMode.SAME_STEP and isinstance(env.unwrapped, SyncVectorEnv):
            # It resets an environment before anybody has read the last observation, which is overwritten if the
            # environment returns the same array again.
            inner: list[Any] = env.unwrapped.envs
            inner[:] = [each if isinstance(each, CopyObservations) else CopyObservations(each) for each in inner]
        self._told_of_equal_ends = False
        self._started = False
        # Whether an episode ended in the last step, so that NEXT_STEP will reset it in the next.
        self._autoreset_due = False
        self.num_envs = env.num_envs
        self.time_limit = env.spec.max_episode_steps if env.spec is not None else None

    def step(self, actions: Any, reset_mask: np.ndarray, seeds: Sequence[int | None]) -> BatchedStepResult:
        """See :meth:`worldloom.envs.backends.base.Backend.step`.

        Raises ``EnvError`` if the environment ignores ``reset_mask`` where its autoreset mode needs it.
        """
        if actions is None or not self._started:
            return self._reset_all(seeds)
        if self._mode is AutoresetMode.DISABLED and reset_mask.any():
            self._env.reset(options={"reset_mask": reset_mask.copy()})
        answer = self._env.step(actions if self._joined is None else self._joined.split(actions))
        native, reward, terminated, truncated, info = read_vector_step(answer, self.num_envs)
        obs = self._flatten(native, "step")
        is_terminal = terminated & ~reset_mask
        is_last = (is_terminal | truncated) & ~reset_mask
        if self._mode is AutoresetMode.SAME_STEP and is_last.any():
            # Where an episode ended, `obs` is the first of the next episode; this row needs the last one. Copied before
            # others are reset, which may write into the same array.
            last = self._last_observations(info, is_last, native, obs)
        # NEXT_STEP has already reset them, but Gymnasium's own vectors must be reset with this episode's seed.
        if reset_mask.any() and (self._mode is not AutoresetMode.NEXT_STEP or self._seeds_per_episode):
            obs = self._reset_where(reset_mask, seeds, obs)
        self._autoreset_due = bool(is_last.any())
        if self._mode is AutoresetMode.SAME_STEP and is_last.any():
            for env, observation in last.items():
                for name, value in observation.items():
                    obs[name][env] = value
            info = info.get("final_info", {})
        infos = {int(env): _info_of(info, int(env)) for env in np.flatnonzero(is_last)}
        rewards = np.where(reset_mask, 0, reward).astype(np.float32)
        return BatchedStepResult(obs, rewards, is_last, is_terminal, infos=infos)

    def replay_actions(self, seeds: Sequence[int], actions: Sequence[Any], lengths: np.ndarray) -> None:
        """Not supported: the environments can only be stepped all at once, and their episodes differ in length."""
        return None

    def render(self) -> Any:
        """See :meth:`worldloom.envs.backends.base.Backend.render`."""
        frames = self._env.render()
        return frames[0] if frames else None

    def close(self) -> None:
        """See :meth:`worldloom.envs.backends.base.Backend.close`."""
        self._env.close()

    def _reset_all(self, seeds: Sequence[int | None]) -> BatchedStepResult:
        if self._autoreset_due and self._mode is AutoresetMode.NEXT_STEP:
            # A reset does not cancel the pending autoreset of AsyncVectorEnv without shared memory; a step consumes it.
            self._env.step(self._env.action_space.sample())
        obs = read_reset(self._env.reset(seed=list(seeds) if self._seeds_per_episode else seeds[0]))
        self._started, self._autoreset_due = True, False
        false = np.zeros(self.num_envs, bool)
        return BatchedStepResult(self._flatten(obs, "reset"), np.zeros(self.num_envs, np.float32), false, false.copy())

    def _flatten(self, obs: Any, source: str) -> dict[str, np.ndarray]:
        try:
            return self._observations.flatten(obs, lead=(self.num_envs,))
        except DataError as error:
            raise excluded(error, source) from error

    def _last_observations(
        self, info: Any, is_last: np.ndarray, native: Any, next_obs: dict[str, np.ndarray]
    ) -> dict[int, dict[str, np.ndarray]]:
        """The last observations of the episodes that ended, by environment, from ``info["final_obs"]``."""
        final = info.get("final_obs") if isinstance(info, Mapping) else None
        last = {}
        for env in np.flatnonzero(is_last).tolist():
            if final is None or final[env] is None:
                raise EnvContractError(
                    f"The episode of environment {env} ended, but info['final_obs'] does not hold its last "
                    "observation, which the autoreset mode SAME_STEP needs; build the vector environment with "
                    "AutoresetMode.NEXT_STEP, or give make_env an id or a function instead."
                )
            try:
                last[env] = self._observations.flatten(final[env])
            except DataError as error:
                raise excluded(error, "info['final_obs']") from error
            if self._observations.share_memory(final[env], native):
                raise EnvContractError(
                    f"info['final_obs'] of environment {env} lies in the array of the observations that step returned, "
                    "which holds the first observation of the next episode; put a copy of the last one into it."
                )
            same = all(np.array_equal(value, next_obs[name][env]) for name, value in last[env].items())
            if same and not self._told_of_equal_ends:
                self._told_of_equal_ends = True
                _log.warning(
                    "The last observation of an episode in environment %d equals the first of the next. If the "
                    "environment returns the same array at every call, return copies: SAME_STEP has overwritten it.",
                    env,
                )
        return last

    def _reset_where(
        self, reset_mask: np.ndarray, seeds: Sequence[int | None], obs: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Reset environments where ``reset_mask``; returns all observations, checked to be ``obs`` elsewhere."""
        options = {"reset_mask": reset_mask.copy()}
        answer = (
            self._env.reset(seed=list(seeds), options=options)
            if self._seeds_per_episode
            else self._env.reset(options=options)
        )
        after = self._flatten(read_reset(answer), "reset")
        if any(not np.array_equal(after[name][~reset_mask], value[~reset_mask]) for name, value in obs.items()):
            raise EnvError(
                f"{self._env} ignores options['reset_mask'], which its autoreset mode {self._mode.name} needs; "
                "build it with AutoresetMode.NEXT_STEP, or give make_env an id or a function instead."
            )
        return after


def _info_of(info: Any, env: int) -> dict[str, float]:
    """The numbers of one environment in the ``info`` of a vector: arrays [N], with masks [N] under ``_name``."""
    if not isinstance(info, Mapping):
        return {}
    mine = {}
    for name, value in info.items():
        if name.startswith("_") or not np.all(np.asarray(info.get(f"_{name}", True)).ravel()[env : env + 1]):
            continue
        if isinstance(value, Mapping):
            mine[name] = _info_of(value, env)
        elif isinstance(value, np.ndarray) and value.ndim and len(value) > env:
            mine[name] = value[env]
    return scalars(mine)
