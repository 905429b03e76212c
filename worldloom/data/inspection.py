"""What a recorded dataset holds, and what is wrong with it, row by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from worldloom.data.dataset import Dataset
from worldloom.errors import DataError

_SHORTER = 0.2
"""Share of episodes shorter than the longest from which it is suspicious that none is terminal."""
_MAX_ROWS = 1 << 16
"""Rows of an episode that are read at once."""


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found in the episodes it read.

    Attributes:
      dataset: the dataset.
      episodes: numbers of the episodes read, int64 [E].
      returns: sum of rewards of each, [E]; NaN where a row could not be read.
      terminal: which of them ended in a terminal state, bool [E]; the others were cut by a limit or the recording.
      tasks: number of episodes of each task; empty without tasks.
      obs_range: smallest and largest value of each observation array; a single one has the name ``"obs"``.
      action_range: smallest and largest value of continuous actions, or {action: how often} of discrete ones.
      reward_range: smallest and largest reward.
      notes: what is suspicious, though it can be trained on.
      problems: sentences naming the row and what is wrong there.
      unreadable: number of episodes with such a row.
    """

    dataset: Dataset
    episodes: np.ndarray
    returns: np.ndarray
    terminal: np.ndarray
    tasks: dict[int, int]
    obs_range: dict[str, tuple[float, float]]
    action_range: dict[Any, Any]
    reward_range: tuple[float, float]
    notes: list[str]
    problems: list[str]
    unreadable: int

    @property
    def lengths(self) -> np.ndarray:
        """Steps of each episode read, [E]: one less than rows."""
        return self.dataset.episode_lengths[self.episodes] - 1


def inspect(
    dataset: Dataset,
    *,
    max_episodes: int | None = None,
    max_problems: int = 20,
    progress: Callable[[Any], Any] = iter,
) -> Inspection:
    """Read a dataset once, checking every row.

    Args:
      dataset: the dataset.
      max_episodes: read so many episodes, spread evenly; None reads all.
      max_problems: how many problems are described; all are counted.
      progress: wraps the episodes' numbers, such as ``tqdm``.
    """
    count = dataset.num_episodes
    chosen = np.arange(count)
    if max_episodes is not None and max_episodes < count:
        chosen = np.linspace(0, count - 1, max_episodes).astype(np.int64)
    ranges = _Ranges()
    returns, terminal = np.full(len(chosen), np.nan), np.zeros(len(chosen), bool)
    tasks: dict[int, int] = {}
    problems: list[str] = []
    unreadable = 0
    for place, number in enumerate(progress(chosen.tolist())):
        try:
            total = 0.0
            for rows in _pieces(dataset, number):
                total += float(rows["rewards"].sum(dtype=np.float64))
                ranges.add(rows)
                terminal[place] |= bool(rows["is_terminal"].any())
            returns[place] = total
            if "task" in rows:
                tasks[int(rows["task"])] = tasks.get(int(rows["task"]), 0) + 1
        except DataError as error:
            unreadable += 1
            if len(problems) < max_problems:
                problems.append(str(error))
    return Inspection(
        dataset,
        chosen,
        returns,
        terminal,
        dict(sorted(tasks.items())),
        ranges.obs,
        ranges.actions,
        ranges.rewards,
        _notes(dataset, ranges, returns, terminal),
        problems,
        unreadable,
    )


def _pieces(dataset: Dataset, number: int) -> Any:
    first, end = int(dataset.first_rows[number]), int(dataset.first_rows[number + 1])
    for start in range(first, end, _MAX_ROWS):
        yield dataset.take(np.arange(start, min(start + _MAX_ROWS, end)))


class _Ranges:
    """Smallest and largest values so far."""

    def __init__(self) -> None:
        self.obs: dict[str, tuple[float, float]] = {}
        self.actions: dict[Any, Any] = {}
        self.rewards = (np.inf, -np.inf)
        self.still: dict[str, np.ndarray] = {}

    def add(self, rows: dict[str, Any]) -> None:
        obs = rows["obs"] if isinstance(rows["obs"], dict) else {"obs": rows["obs"]}
        for name, array in obs.items():
            self.obs[name] = _wider(self.obs.get(name, (np.inf, -np.inf)), array)
            if array.ndim == 2:
                never = (array == array[:1]).all(0)
                self.still[name] = self.still.get(name, never) & never
        self.rewards = _wider(self.rewards, rows["rewards"])
        actions = rows["actions"][~rows["is_last"]]
        if actions.size:
            self.actions["actions"] = _wider(self.actions.get("actions", (np.inf, -np.inf)), actions)
            counts = actions.sum(0) if set(np.unique(actions[:1])) <= {0, 1} else np.zeros(actions.shape[1])
            self.actions["counts"] = self.actions.get("counts", 0) + counts


def _wider(known: tuple[float, float], array: np.ndarray) -> tuple[float, float]:
    return min(known[0], float(array.min())), max(known[1], float(array.max()))


def _notes(dataset: Dataset, ranges: _Ranges, returns: np.ndarray, terminal: np.ndarray) -> list[str]:
    notes = []
    if ranges.rewards == (0.0, 0.0):
        notes.append("All rewards are 0: there is no behaviour to learn from them.")
    if dataset.action_type == "continuous" and ranges.actions:
        low, high = ranges.actions["actions"]
        if max(-low, high) < 0.5:
            notes.append(f"Actions lie in {low:.3g} … {high:.3g}: are they scaled to [-1, 1]?")
    for name, still in ranges.still.items():
        if still.any() and len(returns) > 1:
            notes.append(f"{int(still.sum())} of {still.size} numbers of {name} never change in an episode.")
    lengths = dataset.episode_lengths
    # A few shorter ones are those that were cut when the recording ended.
    if not terminal.any() and (lengths < lengths.max()).mean() > _SHORTER and len(lengths) > 2:
        notes.append(
            "Episodes differ in length, but none is marked terminal: if the environment ends episodes itself, say so "
            "by terminals, or values will be bootstrapped beyond those ends."
        )
    return notes
