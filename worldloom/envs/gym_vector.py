"""Vector environments of Gymnasium, made by the user, as rows. All three autoreset modes give the same rows.

Rows need a call in which a finished environment only resets. ``NEXT_STEP`` has it. In the other modes every call
steps every environment, so a finished one is carried along for that call with a throw-away action and then reset
with ``options={"reset_mask": ...}``: one step and one reset per episode are the price.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from worldloom.envs.observations import ObservationSpec
from worldloom.envs.rows import Arrivals
from worldloom.errors import ConfigError, EnvError


class GymVector:
    """A Gymnasium vector environment as a backend.

    Gymnasium's own ``SyncVectorEnv`` and ``AsyncVectorEnv`` are reset with a seed per episode. Others take one integer
    seed at the first reset and draw on from there.

    Raises ``ConfigError`` if ``env.metadata["autoreset_mode"]`` does not name a mode.
    """

    def __init__(self, env: gym.vector.VectorEnv[Any, Any, Any]):
        mode = (env.metadata or {}).get("autoreset_mode")
        if not isinstance(mode, AutoresetMode):
            raise ConfigError(
                f"The vector environment's metadata['autoreset_mode'] is {mode!r}; a gymnasium.vector.AutoresetMode "
                "is needed to tell where episodes end."
            )
        self._env: Any = env  # Gymnasium's annotations leave out the seed lists that its vector environments take.
        self._mode = mode
        self._seeds_per_episode = isinstance(env.unwrapped, SyncVectorEnv | AsyncVectorEnv)
        self._observations = ObservationSpec(env.single_observation_space)
        self._started = self._pending = False
        self.num_envs = env.num_envs
        self.observation_space, self.action_space = env.single_observation_space, env.single_action_space
        self.time_limit = env.spec.max_episode_steps if env.spec is not None else None

    def advance(self, actions: Any, starting: np.ndarray, seeds: Sequence[int | None]) -> Arrivals:
        """See :class:`worldloom.envs.rows.Backend`."""
        if actions is None or not self._started:
            return self._reset_all(seeds)
        if self._mode is AutoresetMode.DISABLED and starting.any():
            self._env.reset(options={"reset_mask": starting.copy()})
        native, reward, terminated, truncated, info = self._env.step(actions)
        obs = self._flat(native)
        terminal = np.array(terminated, bool) & ~starting
        last = (terminal | np.array(truncated, bool)) & ~starting
        if starting.any() and (self._mode is not AutoresetMode.NEXT_STEP or self._seeds_per_episode):
            obs = self._reset_where(starting, seeds, obs)
        self._pending = bool(last.any())
        if self._mode is AutoresetMode.SAME_STEP:
            # `obs` of a finished environment is already the next episode's; its row is the last of this one.
            for env in np.flatnonzero(last):
                for name, value in self._observations.flatten(info["final_obs"][env]).items():
                    obs[name][env] = value
        return Arrivals(obs, np.where(starting, 0, reward).astype(np.float32), last, terminal)

    def replay(self, seeds: Sequence[int], actions: Sequence[Any], lengths: np.ndarray) -> None:
        """Not possible: the environments can only be stepped all at once."""
        return None

    def render(self) -> Any:
        """See :class:`worldloom.envs.rows.Backend`."""
        frames = self._env.render()
        return frames[0] if frames else None

    def close(self) -> None:
        """See :class:`worldloom.envs.rows.Backend`."""
        self._env.close()

    def _reset_all(self, seeds: Sequence[int | None]) -> Arrivals:
        if self._pending and self._mode is AutoresetMode.NEXT_STEP:
            # Lets the reset that is due happen now: AsyncVectorEnv without shared memory does not drop it below.
            self._env.step(self._env.action_space.sample())
        obs, _ = self._env.reset(seed=list(seeds) if self._seeds_per_episode else seeds[0])
        self._started, self._pending = True, False
        nothing = np.zeros(self.num_envs, bool)
        return Arrivals(self._flat(obs), nothing.astype(np.float32), nothing, nothing.copy())

    def _flat(self, obs: Any) -> dict[str, np.ndarray]:
        return self._observations.flatten(obs, lead=(self.num_envs,))

    def _reset_where(
        self, starting: np.ndarray, seeds: Sequence[int | None], obs: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """``obs`` with the first observations of new episodes where ``starting``; the others must stay untouched."""
        masked = {"reset_mask": starting.copy()}
        native, _ = (
            self._env.reset(seed=list(seeds), options=masked)
            if self._seeds_per_episode
            else self._env.reset(options=masked)
        )
        fresh = self._flat(native)
        if any(not np.array_equal(fresh[name][~starting], value[~starting]) for name, value in obs.items()):
            raise EnvError(
                f"{self._env} ignores options['reset_mask'], which its autoreset mode {self._mode.name} needs; "
                "build it with AutoresetMode.NEXT_STEP, or give make_env an id or a function instead."
            )
        return fresh
