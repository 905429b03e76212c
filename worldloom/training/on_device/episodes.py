"""What the episodes of environments on the device have come to after each step, computed on the host."""

from __future__ import annotations

import numpy as np


def episodes_so_far(
    is_first: np.ndarray, rewards: np.ndarray, returns: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return and length of each environment's episode after each of S steps, float64 and int64 [S, N].

    Rewards are added one after the other, as ``VectorEnv`` does, so that the sums are the same to the last bit.

    Args:
      is_first: whether an episode begins there, bool [S, N].
      rewards: [S, N].
      returns: before these steps, float64 [N].
      lengths: before these steps, integers [N].
    """
    totals = rewards.astype(np.float64)
    # Between two steps at which episodes begin, the sums of all environments go on.
    begins = np.union1d(0, np.flatnonzero(is_first.any(1)))
    for begin, end in zip(begins, [*begins[1:], len(rewards)], strict=True):
        totals[begin] += np.where(is_first[begin], 0.0, returns)
        np.cumsum(totals[begin:end], axis=0, out=totals[begin:end])
        returns = totals[end - 1]
    steps = np.arange(len(rewards))[:, None]
    begun = np.maximum.accumulate(np.where(is_first, steps, -1 - lengths))
    return totals, steps - begun
