"""What becomes known of the episodes that online training collects: means, and a line for each in a file."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from worldloom.files import write_atomically
from worldloom.training.callbacks.base import Callback, CallbackResult, StepInfo
from worldloom.training.callbacks.logs import rename_old

_log = logging.getLogger("worldloom")

EPISODES_FILE = "episodes.jsonl"
_SOON, _LONG = 2, 10
"""Multiples of the prefill after which the log says that no new reward was met: at the end, and before."""


class EpisodesCallback(Callback):
    """Publishes means over the episodes that ended since the last log record: ``collect/return``, ``collect/length``.

    Also published are their number, ``collect/episodes``, ``collect/restarts``, the number of environment processes
    replaced so far, and, once there is one, ``collect/bad_steps``, the number of steps so far that returned NaN. Online
    training adds this callback itself. Episodes cut short by a crash or by NaN are excluded. A warning says once if no
    reward was met that the prefill had not, see ``RewardsSeen``.

    Args:
      collector: the run's collector.
    """

    order = -1
    measures = True
    in_every_process = True  # The list of episodes is cleared in each.

    def __init__(self, collector: Any):
        self.collector = collector
        self._said = False

    def on_step(self, info: StepInfo) -> CallbackResult:
        """Publish if an episode ended, and clear the collector's list."""
        counts = self._counts()
        self.collector.ends = []
        self._say_if_nothing_new(info, after=_LONG * info.config.prefill)
        return counts

    def on_train_end(self, info: StepInfo) -> CallbackResult:
        """Publish the last episodes. The list is kept, so a continued run has the records of an uninterrupted one."""
        self._say_if_nothing_new(info, after=_SOON * info.config.prefill)
        return self._counts()

    def _say_if_nothing_new(self, info: StepInfo, after: int) -> None:
        """Log it once, if ``after`` decision steps were taken.

        Weights that learned from recorded data first may be as good in the prefill as they ever get.
        """
        text = None if info.config.offline_updates else self.collector.seen.nothing_new()
        if text and not self._said and self.collector.decisions >= after:
            self._said = True
            _log.warning("%s", text)

    def _counts(self) -> CallbackResult:
        ends = [record.end for record in self.collector.ends if record.end.whole]
        counts = {"collect/episodes": float(len(ends)), "collect/restarts": float(self.collector.restarts)}
        if self.collector.bad_steps:
            counts["collect/bad_steps"] = float(self.collector.bad_steps)
        if not ends:
            return counts if self.collector.restarts or self.collector.bad_steps else None
        returns, lengths = [end.episode_return for end in ends], [end.length for end in ends]
        return {"collect/return": float(np.mean(returns)), "collect/length": float(np.mean(lengths)), **counts}


class EpisodeLog(Callback):
    """Writes ``episodes.jsonl``: a line for each training episode that ended, at every log record.

    ``{"episode": 7, "env_steps": 1600, "return": -812.3, "length": 200, "terminated": false, "worker": 0}``, where
    ``env_steps`` are those of the run at its end, those in other environments before included, ``length`` counts
    decision steps and ``worker`` is the environment.
    Where they apply: ``"prefill": true``; ``"crashed": true`` or ``"bad_step": true`` where a crash or NaN cut the
    episode, whose return is then incomplete; and ``"info"``, the numbers in the last step's ``info``.
    A resumed run has the lines of an uninterrupted one; a new run first renames an existing file.

    Args:
      folder: folder of the file.
    """

    # Before the list is cleared.
    order = -2

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / EPISODES_FILE
        self._file: TextIO | None = None
        self._lines = 0

    def on_train_begin(self, info: StepInfo) -> CallbackResult:
        """Open the file; a resumed run first removes the lines of episodes that it has yet to collect again."""
        self._lines = 0
        if self.path.exists():
            if info.step == 0:
                rename_old(self.path)
            else:
                self._lines = self._truncate(info.episodes_ended)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        return None

    def on_step(self, info: StepInfo) -> CallbackResult:
        """Write the episodes that are not in the file yet."""
        assert self._file is not None
        for record in info.episodes():
            if record.number >= self._lines:
                self._file.write(json.dumps(_line(record)) + "\n")
                self._lines = record.number + 1
        self._file.flush()
        return None

    def on_train_end(self, info: StepInfo) -> CallbackResult:
        """Write the last episodes."""
        return self.on_step(info)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _truncate(self, episodes: int) -> int:
        """Keep the lines of the first ``episodes`` episodes; returns the number of the next one to write."""
        kept, following = [], 0
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            number = _number_of(line)
            if number < episodes:
                kept.append(line)
                following = int(number) + 1
        write_atomically(self.path, "".join(kept))
        return following


def _line(record: Any) -> dict[str, Any]:
    """The line of an ``EpisodeRecord``."""
    end = record.end
    line = {
        "episode": record.number,
        "env_steps": record.env_steps,
        "return": end.episode_return,
        "length": end.length,
        "terminated": end.terminated,
        "worker": end.env,
    }
    flags = {"prefill": record.prefill, "crashed": end.crashed, "bad_step": end.bad_step}
    return (
        line | {name: True for name, value in flags.items() if value} | ({"info": dict(end.info)} if end.info else {})
    )


def _number_of(line: str) -> float:
    """Number of the episode in a line; infinite if the line is incomplete, because its writer was killed."""
    try:
        return json.loads(line)["episode"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
