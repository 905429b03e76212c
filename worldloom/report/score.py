"""Scores of runs: the statistic of a published experiment, and its spread over seeds and tasks.

Aggregates follow rliable (Agarwal et al. 2021, *Deep reinforcement learning at the edge of the statistical precipice*):
the interquartile mean over all runs of all tasks, with a bootstrap that resamples runs within each task.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from worldloom.algorithm import Curve, ScoreRule
from worldloom.config import check, is_number, shown
from worldloom.errors import DataError, FileFormatError

Record = Mapping[str, Any]

_LAST_PART = 0.05
"""Part of the budget in which training episodes must end where a rule names no window."""
_ACHIEVEMENTS = "achievements/"
"""Prefix of Crafter's counts in the ``info`` of an episode."""


class Score(NamedTuple):
    """The score of one run.

    Attributes:
      value: the statistic.
      env_steps: environment steps that it is of: those of the evaluation, or the end of the window.
      episodes: training episodes that it is computed from; 0 for an evaluation.
      text: what was computed, in words.
      rates: success rates in % by achievement; empty where there are none.
    """

    value: float
    env_steps: int
    episodes: int
    text: str
    rates: Mapping[str, float] = {}


def read_episodes(path: str | Path) -> list[dict[str, Any]]:
    """The whole episodes in an ``episodes.jsonl``: those that no crash and no NaN has cut; [] without such a file.

    Lines that are not JSON objects (a truncated last line) are skipped, as in other logs.

    Raises ``FileFormatError`` naming the first line without the numbers that an episode has.
    """
    path, episodes = Path(path), []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            episode = json.loads(line)
        except ValueError:
            continue
        if not isinstance(episode, dict) or episode.get("crashed") or episode.get("bad_step"):
            continue
        for name in ("env_steps", "return"):
            if not _is_finite(episode.get(name)):
                raise FileFormatError(
                    f"{path}, line {number}: {name} of an episode must be a finite number, not "
                    f"{shown(episode.get(name))[:100]}; without this line, the others can be read."
                )
        if not isinstance(episode.get("info", {}), dict):
            raise FileFormatError(
                f"{path}, line {number}: info of an episode must be an object, not {shown(episode['info'])[:100]}; "
                "without this line, the others can be read."
            )
        episodes.append(episode)
    return episodes


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def score(
    rule: ScoreRule,
    episodes: Sequence[Record],
    records: Sequence[Record],
    *,
    budget: int,
    at: int | None = None,
    window: int | None = None,
) -> Score:
    """The score of a run by ``rule``.

    Args:
      rule: what to compute.
      episodes: its whole training episodes, see :func:`read_episodes`.
      records: lines of ``metrics.jsonl``.
      budget: environment steps of a whole run.
      at: environment steps at which to compute it; None is the end of the rule's window, or the budget, or what the
        run has reached if that is less.
      window: environment steps before ``at`` in which training episodes must end; None is the rule's.

    Raises:
      ConfigError: ``window`` is below 1, or the rule has none.
      DataError: the run has no such episodes or evaluations, or the newest evaluation has no finite return.
    """
    if window is not None:
        check(is_number(window) and window >= 1, f"window must be at least 1 environment step, not {shown(window)}.")
        check(
            rule.source == "training",
            f"A window of {window:,} environment steps is for the mean return of training episodes, and the statistic "
            f"here is '{rule.source}'; leave --window out, or take --statistic training.",
        )
    reached = max([line["env_steps"] for line in episodes] + [line.get("env_steps", 0) for line in records], default=0)
    last = rule.window[1] if rule.window else budget
    end = min(last, reached) if at is None else at
    if rule.source in ("evaluation", "greedy"):
        return _evaluation_score(records, end, "eval/return" if rule.source == "evaluation" else "eval/greedy_return")
    if rule.source == "achievements":
        return _achievements_score([line for line in episodes if line["env_steps"] <= end], end)
    if window is None:
        window = rule.window[1] - rule.window[0] if rule.window else max(1, round(_LAST_PART * budget))
    found = [line["return"] for line in episodes if end - window < line["env_steps"] <= end]
    if not found:
        raise DataError(f"No training episode ended between {end - window:,} and {end:,} environment steps.")
    text = f"mean of {len(found)} training episodes that end in {max(0, end - window):,}–{end:,} environment steps"
    return Score(float(np.mean(found)), end, len(found), text)


def _evaluation_score(records: Sequence[Record], end: int, name: str) -> Score:
    found = [line for line in records if name in line and line.get("env_steps", 0) <= end]
    if not found:
        raise DataError(f"No evaluation ({name}) up to {end:,} environment steps is in its metrics.jsonl.")
    newest = max(found, key=lambda line: (line.get("env_steps", 0), line.get("step", 0)))
    steps = newest.get("env_steps", 0)
    if not _is_finite(newest[name]):
        earlier = [line.get("env_steps", 0) for line in found if _is_finite(line[name])]
        other = f"; --at {max(earlier)} scores the one before" if earlier and max(earlier) < steps else ""
        raise DataError(f"{name} of the evaluation after {steps:,} environment steps is no finite number{other}.")
    return Score(newest[name], steps, 0, f"{name} of the evaluation after {steps:,} environment steps")


def _achievements_score(episodes: Sequence[Record], end: int) -> Score:
    counts = [
        {
            name: value
            for name, value in line.get("info", {}).items()
            if name.startswith(_ACHIEVEMENTS) and _is_finite(value)
        }
        for line in episodes
    ]
    counts = [count for count in counts if count]
    if not counts:
        raise DataError(f"No training episode up to {end:,} environment steps reports achievements in its info.")
    names = sorted({name for count in counts for name in count})
    rates = {
        name.removeprefix(_ACHIEVEMENTS): 100 * float(np.mean([count.get(name, 0) >= 1 for count in counts]))
        for name in names
    }
    value = geometric_score(list(rates.values()))
    text = f"geometric mean of {len(rates)} success rates over {len(counts)} training episodes up to {end:,} steps (%)"
    return Score(value, end, len(counts), text, rates)


def geometric_score(rates: Sequence[float]) -> float:
    """Crafter's score of success rates in % [N]: exp(mean(log(1 + rate))) − 1 (Hafner 2022)."""
    return float(np.expm1(np.mean(np.log1p(np.asarray(rates, np.float64)))))


def interquartile_mean(scores: Any) -> float:
    """Mean of the scores [N] between their quartiles: the lowest and highest ⌊N / 4⌋ are left out, as in rliable."""
    values = np.sort(np.asarray(scores, np.float64).ravel())
    cut = len(values) // 4
    return float(values[cut : len(values) - cut].mean())


def bootstrap_interval(
    tasks: Sequence[Sequence[float]], *, level: float = 0.95, repetitions: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the interquartile mean, with runs drawn anew within each task.

    Args:
      tasks: scores of the runs, by task; tasks may have different numbers of runs.
      level: probability of the interval.
      repetitions: bootstrap samples.
      seed: seed of the draws.
    """
    rng = np.random.default_rng(seed)
    drawn: list[NDArray[np.float64]] = []
    for runs in tasks:
        values = np.asarray(runs, np.float64)
        drawn.append(values[rng.integers(len(values), size=(repetitions, len(values)))])
    samples = np.sort(np.concatenate(drawn, axis=1), axis=1)
    cut = samples.shape[1] // 4
    means = samples[:, cut : samples.shape[1] - cut].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def published_at(curve: Curve, env_steps: int) -> tuple[float, float, float] | None:
    """Mean, lowest and highest of a published curve at ``env_steps``, between its points; None outside of them."""
    if not curve.steps[0] <= env_steps <= curve.steps[-1]:
        return None
    mean, low, high = (float(np.interp(env_steps, curve.steps, y)) for y in (curve.mean, curve.low, curve.high))
    return mean, low, high
