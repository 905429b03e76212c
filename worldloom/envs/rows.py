"""What environments hand to the collector: rows under the arrival rule, and what happened on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from gymnasium.spaces import Space

Arrays = np.ndarray | dict[str, np.ndarray]


class EpisodeEnd(NamedTuple):
    """The episode of an environment ended with the row that carries this event.

    Attributes:
      env: index of the environment.
      episode_return: sum of the episode's rewards.
      length: its decision steps (actions; one less than its rows).
      terminated: whether it reached a true end, not a time limit.
      crashed: whether it was cut because its worker had to be restarted; its return then says little.
    """

    env: int
    episode_return: float
    length: int
    terminated: bool
    crashed: bool


class WorkerRestart(NamedTuple):
    """A worker process died, raised or hung, and was replaced.

    Attributes:
      env: index of the environment.
      reason: one sentence, with the worker's traceback if it left one.
      restarts: how often this environment has been replaced by now.
    """

    env: int
    reason: str
    restarts: int


Event = EpisodeEnd | WorkerRestart


class Rows(NamedTuple):
    """One row of each of N environments. All arrays are fresh: keep them as long as you like.

    Reward and flags belong to *arriving at* ``obs`` (the arrival rule): an episode of n actions has n+1 rows, the
    first with ``is_first`` and reward 0, the last with ``is_last``.

    Attributes:
      obs: ``[N, ...]``, or a dict of such arrays when the observation space is a dict.
      reward: float32 [N], summed over action repeats.
      is_first: bool [N], 1 on the first row of an episode.
      is_last: bool [N], 1 on the last row, whatever ended it; the next action of that environment is ignored.
      is_terminal: bool [N], 1 if the episode truly ended here; a time limit or a crash leaves it 0.
      events: what happened while arriving, in the order of environments.
    """

    obs: Arrays
    reward: np.ndarray
    is_first: np.ndarray
    is_last: np.ndarray
    is_terminal: np.ndarray
    events: tuple[Event, ...] = ()


class Arrival(NamedTuple):
    """Where one environment arrived: flat observation (name to array), reward, and whether and how it ended."""

    obs: dict[str, np.ndarray]
    reward: float
    last: bool
    terminal: bool


class Arrivals(NamedTuple):
    """Where all N environments of a backend arrived; ``obs`` maps flat names to ``[N, ...]``."""

    obs: dict[str, np.ndarray]
    reward: np.ndarray
    last: np.ndarray
    terminal: np.ndarray
    restarts: tuple[WorkerRestart, ...] = ()

    @classmethod
    def stack(cls, rows: Sequence[Arrival], restarts: Sequence[WorkerRestart] = ()) -> Arrivals:
        """Put the arrivals of single environments side by side."""
        return cls(
            obs={name: np.stack([row.obs[name] for row in rows]) for name in rows[0].obs},
            reward=np.array([row.reward for row in rows], np.float32),
            last=np.array([row.last for row in rows], bool),
            terminal=np.array([row.terminal for row in rows], bool),
            restarts=tuple(restarts),
        )


class Backend(Protocol):
    """How N environments are stepped: in this process, in workers, or by a Gymnasium vector environment.

    Attributes:
      num_envs: N.
      observation_space: Gymnasium space of one environment.
      action_space: likewise.
      time_limit: environment steps after which an episode is truncated, or ``None`` if that is not known.
    """

    num_envs: int
    observation_space: Space[Any]
    action_space: Space[Any]
    time_limit: int | None

    def advance(self, actions: Any, starting: np.ndarray, seeds: Sequence[int | None]) -> Arrivals:
        """Reset the environments where ``starting`` (bool [N]) with their seeds, step the others with their actions.

        ``actions`` is batched the way Gymnasium batches the action space, ``None`` if all are starting.
        """
        ...

    def replay(self, seeds: Sequence[int], actions: Sequence[Any], lengths: np.ndarray) -> Arrivals | None:
        """Reset each environment with its seed and take its actions again; ``None`` if that cannot be done.

        ``actions[i]`` holds the ``lengths[i]`` actions of environment i on the leading axis of its arrays.
        """
        ...

    def render(self) -> Any:
        """A frame of environment 0 as its ``render`` returns it."""
        ...

    def close(self) -> None:
        """Release everything; safe to call twice."""
        ...


def episode_seed(seed: int, env: int, episode: int) -> int:
    """Seed in [0, 2^31) of an episode: a pure function of the run's seed, the environment and the episode's number.

    Neighbouring runs, environments and episodes get unrelated seeds (``numpy.random.SeedSequence``), so evaluation
    with ``seed + 1`` shares no episode with training.
    """
    return int(np.random.SeedSequence(seed, spawn_key=(env, episode)).generate_state(1)[0] >> 1)


def pick(batch: Any, index: int) -> Any:
    """Element ``index`` of an array or of every array in nested dicts."""
    if isinstance(batch, dict):
        return {key: pick(value, index) for key, value in batch.items()}
    return batch[index]
