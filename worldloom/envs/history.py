"""The actions taken in each environment's current episode, so that the episode can be played again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class History:
    """Actions since the last reset, per environment.

    Attributes:
      lengths: int64 [N], actions taken in the current episode.
      arrays: name to ``[N, capacity, ...]``; beyond an environment's length they hold nothing of meaning.
    """

    def __init__(self, lengths: np.ndarray, arrays: Mapping[str, np.ndarray]):
        self.lengths = np.array(lengths, np.int64)
        self.arrays = {name: np.array(value) for name, value in arrays.items()}

    def clear(self, starting: np.ndarray) -> None:
        """Forget the actions of environments where ``starting`` (bool [N]): a new episode begins there."""
        self.lengths[starting] = 0

    def append(self, actions: Mapping[str, np.ndarray], acting: np.ndarray) -> None:
        """Add one action ``{name: [N, ...]}`` in the environments where ``acting`` (bool [N])."""
        for name, value in actions.items():
            array = self.arrays[name]
            if self.lengths.max() == array.shape[1]:
                room = np.zeros((len(array), max(64, array.shape[1]), *array.shape[2:]), array.dtype)
                array = self.arrays[name] = np.concatenate([array, room], axis=1)
            array[acting, self.lengths[acting]] = value[acting]
        self.lengths[acting] += 1

    def of(self, env: int) -> dict[str, np.ndarray]:
        """The actions ``{name: [length, ...]}`` of one environment."""
        return {name: value[env, : self.lengths[env]] for name, value in self.arrays.items()}

    def padded(self) -> dict[str, np.ndarray]:
        """Copies ``{name: [N, longest, ...]}``, zero where an episode is shorter."""
        longest = int(self.lengths.max())
        short = np.arange(longest) >= self.lengths[:, None]
        result = {name: value[:, :longest].copy() for name, value in self.arrays.items()}
        for value in result.values():
            value[short] = 0
        return result
