"""What a measurement of ``accelerator.py`` is: one figure, which is written as soon as it exists."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerator_worker import Clock, OutOfTime, run_command

SMOKE_SECONDS, RESUMING_SMOKE_SECONDS = 20, 75
"""Of any measurement of a smoke run, and of one that needs time to save itself."""


class LeftOut(Exception):
    """A measurement that cannot be made here and is no failure; the text says what it needs."""


class Unfinished(OutOfTime):
    """A run that was stopped because the time was over, and goes on at the next start; ``progress`` is written."""

    def __init__(self, progress):
        super().__init__("goes on at the next start")
        self.progress = progress


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
      name: of its figure, unique in its part.
      seconds: what it needs on a card, with compilation; it is started if so much time is left, and ended as failed
        after three times as long, or when it has taken half of the time that is left for the second time. Of one that
        resumes: the shortest useful time.
      call: "module:function" in a worker process, which gives the figure; or a function of ``Place`` in this process,
        which measures in processes that it starts.
      arguments: of a worker's function, as JSON values.
      env: environment variables of the worker.
      alone: whether the worker is new and ends with the measurement.
      resumes: whether it goes on at the next start, as ``Unfinished`` says; then it takes all the time that there is.
    """

    name: str
    seconds: float
    call: str | Callable[["Place"], Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    alone: bool = False
    resumes: bool = False

    def seconds_of(self, smoke):
        """Seconds that must be left; those of a smoke run are no card's."""
        return (RESUMING_SMOKE_SECONDS if self.resumes else SMOKE_SECONDS) if smoke else self.seconds


def in_worker(name, seconds, call, /, *, alone=False, flags=None, env=None, **arguments):
    """A measurement in a worker; ``flags`` are XLA flags of its process, in addition to those of the environment."""
    env = dict(env or {}) | ({} if flags is None else {"XLA_FLAGS": flags})
    return Task(name, seconds, call, arguments, env, alone or bool(env))


@dataclass(frozen=True)
class Place:
    """What a measurement in this process may use; it starts no JAX backend itself.

    Attributes:
      folder: of the figures; runs have folders in it.
      smoke: whether everything is tiny.
      clock: the end of this start.
      seconds: at most so long.
      env: environment variables of the processes that it starts.
      before: what an earlier start wrote of this measurement; empty if nothing.
      ask: ``ask(call, arguments, env)`` is the figure of a new worker that has the device for itself.
    """

    folder: Path
    smoke: bool
    clock: Clock
    seconds: float
    env: Mapping[str, str]
    before: Mapping[str, Any]
    ask: Callable[[str, Mapping[str, Any], Mapping[str, str]], Any]

    def run(self, words, *, env=None, stop_first=0.0, cwd=None):
        """See ``run_command``."""
        env = {**self.env, **(env or {})}
        return run_command(words, self.clock, self.seconds, env=env, cwd=cwd, stop_first=stop_first)
