"""Replay while rows are collected: which are fresh, and which belong to episodes that are over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from worldloom.replay.buffer import ReplayBuffer
from worldloom.replay.conversion import convert_rewards, pack_flags
from worldloom.replay.sampling import fitting_segments
from worldloom.replay.validation import array_group, convert_columns, convert_latents, infer_schema


class OnlineQueue:
    """Windows of successive new rows, each handed out once, in the order in which they became complete.

    A stream is cut into windows from its first row on, whatever episodes they span, as in DreamerV3's ``Replay`` with
    ``online: True``. What is handed out is a function of the rows held and of :attr:`drawn`.

    Args:
      drawn: newest row whose window counts as handed out; ``-1`` for none.

    Attributes:
      drawn: see above; all that a checkpoint needs.
    """

    def __init__(self, drawn: int = -1):
        self.drawn = drawn

    def pop(self, buffer: ReplayBuffer, count: int, rows: int) -> np.ndarray:
        """Row numbers of the next windows, int64 [W ≤ count, rows]; without those that have lost rows."""
        windows = buffer._storage.index.windows_after(self.drawn, rows)[:count]
        if len(windows):
            self.drawn = int(windows[-1, -1])
        return windows


def add_steps(
    buffer: ReplayBuffer,
    obs: Any,
    actions: Any,
    rewards: np.ndarray,
    is_first: np.ndarray,
    is_last: np.ndarray,
    is_terminal: np.ndarray,
    num_envs: int,
    *,
    latents: Mapping[str, np.ndarray],
) -> None:
    """What ``buffer.add_rows`` of S steps of N environments adds, at once: arrays [S · N, ...], step by step.

    The flags are those that a program has set, and are not checked against each other. Raises ``DataError`` for NaN.
    """
    observations, chosen = array_group(obs, "obs"), array_group(actions, "actions")
    schema = buffer._schema or infer_schema(buffer._declared, observations, chosen, False)
    schema, columns = convert_columns(schema, observations, chosen, is_last, None)
    count = len(is_last)
    columns |= {
        "rewards": convert_rewards(rewards, count),
        "flags": pack_flags(is_first, is_last, is_terminal),
        "stream": (np.arange(count) % num_envs).astype(np.int32),
    }
    buffer._append(schema, columns, convert_latents(latents, buffer.latents, (count,)))


def is_interleaved(buffer: ReplayBuffer, num_envs: int) -> bool:
    """Whether row ``i`` is of stream ``i % num_envs`` and no row has a task: nothing else was added to the buffer."""
    rows, schema = buffer._storage.rows, buffer._schema
    if schema is None:
        return rows.end % num_envs == 0
    first = rows.first
    for streams in rows.iter_column("stream"):
        if not np.array_equal(streams, (first + np.arange(len(streams))) % num_envs):
            return False
        first += len(streams)
    return not schema.has_task and rows.end % num_envs == 0


def has_finished_window(buffer: ReplayBuffer, rows: int, *, cross_episodes: bool) -> bool:
    """Whether ``buffer.draw(…, finished=True)`` finds a window of ``rows`` rows without an episode in progress."""
    return len(fitting_segments(buffer._storage.index, rows, cross_episodes, finished=True)[1]) > 0
