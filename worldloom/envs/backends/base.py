"""What a backend is, and what its steps return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from gymnasium.spaces import Space

from worldloom.envs.time_step import WorkerRestart
from worldloom.errors import ConfigError


class StepResult(NamedTuple):
    """What a step or a reset of one environment returned.

    Attributes:
      obs: flat observation, name to array ``[...]``.
      reward: reward of the step; 0 after a reset.
      is_last: whether the episode ended here, for any reason.
      is_terminal: whether the environment itself ended it; a time limit does not count.
      info: where the episode ended, the numbers in the step's ``info``.
    """

    obs: dict[str, np.ndarray]
    reward: float
    is_last: bool
    is_terminal: bool
    info: Mapping[str, float] = {}


class BatchedStepResult(NamedTuple):
    """The same for all N environments of a backend.

    Attributes:
      obs: flat observations, name to ``[N, ...]``.
      reward: float32 [N].
      is_last: bool [N].
      is_terminal: bool [N].
      restarts: workers that were replaced during the step.
      infos: by environment, where its episode ended, the numbers in the step's ``info``.
    """

    obs: dict[str, np.ndarray]
    reward: np.ndarray
    is_last: np.ndarray
    is_terminal: np.ndarray
    restarts: tuple[WorkerRestart, ...] = ()
    infos: Mapping[int, Mapping[str, float]] = {}

    @classmethod
    def stack(cls, results: Sequence[StepResult], restarts: Sequence[WorkerRestart] = ()) -> BatchedStepResult:
        """Stack the results of N environments along a new leading axis."""
        return cls(
            obs={name: np.stack([result.obs[name] for result in results]) for name in results[0].obs},
            reward=np.array([result.reward for result in results], np.float32),
            is_last=np.array([result.is_last for result in results], bool),
            is_terminal=np.array([result.is_terminal for result in results], bool),
            restarts=tuple(restarts),
            infos={env: result.info for env, result in enumerate(results) if result.info},
        )


class Backend(Protocol):
    """N environments that are stepped together.

    Attributes:
      num_envs: N.
      observation_space: Gymnasium space of one environment.
      action_space: Gymnasium space of one environment.
      time_limit: environment steps after which an episode is truncated, or ``None`` if that is not known.
    """

    num_envs: int
    observation_space: Space[Any]
    action_space: Space[Any]
    time_limit: int | None

    def step(self, actions: Any, reset_mask: np.ndarray, seeds: Sequence[int | None]) -> BatchedStepResult:
        """Reset the environments where ``reset_mask`` (bool [N]) is true, step the others.

        Args:
          actions: batched the way Gymnasium batches the action space; ignored where ``reset_mask``, and ``None`` if
            all environments are reset.
          reset_mask: bool [N].
          seeds: N seeds for ``reset``, ``None`` for environments that are stepped.
        """
        ...

    def replay_actions(
        self, seeds: Sequence[int], actions: Sequence[Any], lengths: np.ndarray
    ) -> BatchedStepResult | None:
        """Reset each environment with its seed and take a recorded sequence of actions; returns the last results.

        Args:
          seeds: N seeds of episodes.
          actions: for environment i its ``lengths[i]`` actions, on the leading axis of each array.
          lengths: integers [N].

        Returns ``None`` if the backend cannot do that.
        """
        ...

    def render(self) -> Any:
        """A frame of environment 0, as its own ``render`` returns it."""
        ...

    def close(self) -> None:
        """Release everything; safe to call twice."""
        ...


@runtime_checkable
class StatefulBackend(Protocol):
    """A :class:`Backend` whose environments can be saved as they are, and that takes actions in the agent's units.

    Its ``step`` gets checked actions by name: float32 [N, A] in [−1, 1], or integers [N].
    """

    def save_state(self) -> dict[str, np.ndarray]:
        """The states of the environments by name."""
        ...

    def load_state(self, arrays: Mapping[str, np.ndarray], obs: Mapping[str, np.ndarray]) -> bool:
        """Return to what :meth:`save_state` returned, with the observations ``obs``; False if that does not fit."""
        ...


def index_nested(batch: Any, index: int) -> Any:
    """Element ``index`` of an array, or of every array in nested dicts and tuples."""
    if isinstance(batch, dict):
        return {key: index_nested(value, index) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(index_nested(value, index) for value in batch)
    return batch[index]


def check_same_spaces(pairs: Sequence[tuple[Space[Any], Space[Any]]]) -> None:
    """Raise ``ConfigError`` unless all (observation space, action space) pairs are equal."""
    for i, pair in enumerate(pairs):
        if pair != pairs[0]:
            raise ConfigError(
                f"Environment {i} has the spaces {pair}, environment 0 {pairs[0]}; all environments must have the "
                "same spaces."
            )
