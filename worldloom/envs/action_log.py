"""The actions taken in each environment's current episode, from which the episode can be replayed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class ActionLog:
    """Actions since the last reset, per environment.

    Attributes:
      lengths: int64 [N], actions taken in the current episode.
      arrays: name to ``[N, capacity, ...]``; entries from an environment's length on are undefined. Actions without an
        entry are only counted.
    """

    def __init__(self, lengths: np.ndarray, arrays: Mapping[str, np.ndarray]):
        self.lengths = np.array(lengths, np.int64)
        self.arrays = {name: np.array(value) for name, value in arrays.items()}

    def clear(self, reset_mask: np.ndarray) -> None:
        """Drop the actions of environments where ``reset_mask`` (bool [N]) is true: a new episode starts there."""
        self.lengths[reset_mask] = 0

    def append(self, actions: Mapping[str, np.ndarray], mask: np.ndarray) -> None:
        """Add one action ``{name: [N, ...]}`` in the environments where ``mask`` (bool [N]) is true."""
        for name, array in self.arrays.items():
            value = actions[name]
            if self.lengths.max() == array.shape[1]:
                # Full: double the capacity, starting from 64.
                room = np.zeros((len(array), max(64, array.shape[1]), *array.shape[2:]), array.dtype)
                array = self.arrays[name] = np.concatenate([array, room], axis=1)
            array[mask, self.lengths[mask]] = value[mask]
        self.lengths[mask] += 1

    def of(self, env: int) -> dict[str, np.ndarray]:
        """The actions ``{name: [length, ...]}`` of one environment."""
        return {name: value[env, : self.lengths[env]] for name, value in self.arrays.items()}

    def padded(self) -> dict[str, np.ndarray]:
        """Copies ``{name: [N, longest, ...]}``, zero where an episode is shorter."""
        longest = int(self.lengths.max())
        padding = np.arange(longest) >= self.lengths[:, None]
        result = {name: value[:, :longest].copy() for name, value in self.arrays.items()}
        for value in result.values():
            value[padding] = 0
        return result
