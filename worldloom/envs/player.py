"""Single Gymnasium environments as arrivals, and N of them stepped in this process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from worldloom.envs.observations import ObservationSpec
from worldloom.envs.rows import Arrival, Arrivals, pick
from worldloom.errors import ConfigError


class Player:
    """Plays one environment, episode after episode. Runs in this process or in a worker.

    Attributes:
      env: the Gymnasium environment, wrapped as it shall be played.
      time_limit: environment steps after which it truncates an episode, or ``None`` if it does not tell.
    """

    def __init__(self, env: gym.Env[Any, Any]):
        self.env = env
        self.time_limit = _time_limit(env)
        self._observations = ObservationSpec(env.observation_space)

    def reset(self, seed: int | None) -> Arrival:
        """Begin an episode."""
        self.env.action_space.seed(seed)
        obs, _ = self.env.reset(seed=seed)
        return Arrival(self._observations.flatten(obs), 0.0, False, False)

    def step(self, action: Any) -> Arrival:
        """Act once. The end by ``truncated`` alone is not terminal; if both are set, the end is a true one."""
        obs, reward, terminated, truncated, _ = self.env.step(action)
        return Arrival(self._observations.flatten(obs), float(reward), bool(terminated or truncated), bool(terminated))

    def replay(self, seed: int, actions: Any, length: int) -> Arrival:
        """Begin an episode and take ``length`` actions, given on the leading axis."""
        arrival = self.reset(seed)
        for step in range(length):
            arrival = self.step(pick(actions, step))
        return arrival


class InProcess:
    """N environments stepped one after another in this process; their exceptions reach the caller unchanged."""

    def __init__(self, build: Callable[[], gym.Env[Any, Any]], num_envs: int):
        self._players: list[Player] = []
        try:
            for _ in range(num_envs):
                self._players.append(Player(build()))
            check_alike([(player.env.observation_space, player.env.action_space) for player in self._players])
        except BaseException:
            self.close()
            raise
        first = self._players[0]
        self.num_envs, self.time_limit = num_envs, first.time_limit
        self.observation_space, self.action_space = first.env.observation_space, first.env.action_space

    def advance(self, actions: Any, starting: np.ndarray, seeds: Sequence[int | None]) -> Arrivals:
        """See :class:`worldloom.envs.rows.Backend`."""
        return Arrivals.stack(
            [
                player.reset(seeds[i]) if starting[i] else player.step(pick(actions, i))
                for i, player in enumerate(self._players)
            ]
        )

    def replay(self, seeds: Sequence[int], actions: Sequence[Any], lengths: np.ndarray) -> Arrivals:
        """See :class:`worldloom.envs.rows.Backend`."""
        return Arrivals.stack(
            [player.replay(seeds[i], actions[i], int(lengths[i])) for i, player in enumerate(self._players)]
        )

    def render(self) -> Any:
        """See :class:`worldloom.envs.rows.Backend`."""
        return self._players[0].env.render()

    def close(self) -> None:
        """See :class:`worldloom.envs.rows.Backend`."""
        for player in self._players:
            player.env.close()
        self._players = []


def check_alike(pairs: Sequence[tuple[gym.Space[Any], gym.Space[Any]]]) -> None:
    """Raise ``ConfigError`` unless all (observation space, action space) pairs are equal."""
    for i, pair in enumerate(pairs):
        if pair != pairs[0]:
            raise ConfigError(f"Environment {i} has the spaces {pair}, environment 0 {pairs[0]}; they must be alike.")


def _time_limit(env: gym.Env[Any, Any]) -> int | None:
    """Set by Gymnasium's ``TimeLimit``, or an environment's own ``time_limit`` attribute."""
    for name in ("_max_episode_steps", "time_limit"):
        if env.has_wrapper_attr(name):
            limit = env.get_wrapper_attr(name)
            if isinstance(limit, int | float) and math.isfinite(limit):
                return math.ceil(limit)
    return None
