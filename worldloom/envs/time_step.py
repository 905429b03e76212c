"""What environments return: time steps under the arrival rule, and the events that come with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from worldloom.config import is_number
from worldloom.spaces.leaves import Arrays


class EpisodeEnd(NamedTuple):
    """An episode ended at the time step that carries this event.

    Attributes:
      env: index of the environment.
      episode_return: sum of the episode's rewards.
      length: decision steps of the episode (its actions; one less than its rows).
      terminated: whether the environment itself ended the episode; false for a time limit.
      crashed: whether it was cut because its worker had to be restarted; its return is then incomplete.
      info: the numbers in the ``info`` of the last step, see :func:`scalars`; empty where there are none.
      bad_step: whether it was cut at a NaN (``on_bad_step="restart"``); its return is then incomplete.
    """

    env: int
    episode_return: float
    length: int
    terminated: bool
    crashed: bool
    info: Mapping[str, float] = {}
    bad_step: bool = False

    @property
    def whole(self) -> bool:
        """Whether the return is that of a whole episode, which statistics are of."""
        return not (self.crashed or self.bad_step)


class BadStep(NamedTuple):
    """A step returned NaN or infinity: the episode was cut there, and the next row begins another.

    Attributes:
      env: index of the environment.
      name: what was NaN or infinite: ``'reward'``, or the quoted name of an observation.
    """

    env: int
    name: str


class WorkerRestart(NamedTuple):
    """A worker process died, raised or hung, and was replaced.

    Attributes:
      env: index of the environment.
      reason: one sentence, followed by the worker's traceback if there is one.
      restarts: how often the worker of this environment has been replaced so far.
    """

    env: int
    reason: str
    restarts: int


Event = EpisodeEnd | WorkerRestart | BadStep


class TimeStep(NamedTuple):
    """One time step of N environments: a row for each of them.

    Reward and flags belong to *arriving at* ``obs`` (the arrival rule): an episode of n actions has n+1 rows, the
    first with ``is_first`` and reward 0, the last with ``is_last``. Later calls do not write into these arrays.

    Attributes:
      obs: ``[N, ...]``, or a dict of such arrays when the observation space is a dict.
      reward: float32 [N], summed over action repeats.
      is_first: bool [N], 1 on the first row of an episode.
      is_last: bool [N], 1 on the last row, whatever ended it; the next action of that environment is ignored.
      is_terminal: bool [N], 1 if the environment itself ended the episode; a time limit or a crash leaves it 0.
      events: workers that were replaced, steps that returned NaN, and episodes that ended, in this order.
    """

    obs: Arrays
    reward: np.ndarray
    is_first: np.ndarray
    is_last: np.ndarray
    is_terminal: np.ndarray
    events: tuple[Event, ...] = ()


_DEEPEST = 8
"""Dicts within dicts in an ``info`` whose numbers are kept; one that contains itself has no end."""


def scalars(info: Mapping[str, Any], _around: tuple[int, ...] = ()) -> dict[str, float]:
    """The numbers and booleans in an ``info``, as floats; those in dicts under ``outer/inner``.

    Arrays of no axes are numbers. Left out are other arrays, texts, NaN, infinities, integers too large for a float,
    a dict within itself, and those within more than seven others.
    """
    found: dict[str, float] = {}
    around = (*_around, id(info))
    for name, value in info.items():
        if isinstance(value, Mapping):
            if id(value) not in around and len(around) < _DEEPEST:
                found |= {f"{name}/{inner}": number for inner, number in scalars(value, around).items()}
            continue
        number = _without_axes(value)
        if isinstance(number, bool | np.bool_) or (is_number(number) and math.isfinite(number)):
            found[str(name)] = float(number)
    return found


def _without_axes(value: Any) -> Any:
    """The element of an array of no axes, of whatever package; another value as it is."""
    if isinstance(value, np.generic) or getattr(value, "shape", None) != () or not hasattr(value, "dtype"):
        return value
    if np.ma.is_masked(value):
        return None
    try:
        return np.asarray(value).item()
    except (TypeError, ValueError, RuntimeError):  # Such as a tensor on a device that NumPy cannot read.
        return None


def episode_seed(seed: int, env: int, episode: int) -> int:
    """Seed in [0, 2^31) of an episode: a pure function of the run's seed, the environment and the episode's number.

    ``numpy.random.SeedSequence`` makes the seeds of neighbouring runs, environments and episodes unrelated, so an
    evaluation with ``seed + 1`` shares no episode with training.
    """
    return int(np.random.SeedSequence(seed, spawn_key=(env, episode)).generate_state(1)[0] >> 1)
