"""``worldloom score``: the published statistic of runs, and its spread over seeds and tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from worldloom.algorithm import Curve, ScoreRule
from worldloom.cli.flags import FAMILY_FLAG, Flag, FlagParser
from worldloom.config import as_integer, shown
from worldloom.errors import ConfigError, DataError
from worldloom.report.curves import read_records
from worldloom.report.score import Score, bootstrap_interval, interquartile_mean, published_at, read_episodes
from worldloom.report.score import score as score_run
from worldloom.training.callbacks.episodes import EPISODES_FILE
from worldloom.training.callbacks.logs import FILE_NAME
from worldloom.training.protocols import what_is_trained
from worldloom.training.run_folder import RunFolder

_STATISTICS = {
    "training": "mean return of training episodes",
    "evaluation": "mean return of the newest evaluation",
    "greedy": "mean return of the newest greedy evaluation",
    "achievements": "success rates of training episodes, and their geometric mean in %",
}
_FLAGS = [
    Flag("at", int, "Environment steps at which to score; by default the end of the budget, or of a shorter run."),
    Flag("statistic", str, f"{', '.join(_STATISTICS)}; the protocol's by default, without one evaluation."),
    Flag(
        "window",
        int,
        "Of training returns: environment steps before --at in which episodes must end; usually the protocol's.",
    ),
    FAMILY_FLAG,
]


class _Run(NamedTuple):
    """A scored run: its folder, protocol (or None), model, environment and score, and its published curve or None."""

    run: RunFolder
    protocol: str | None
    changed: list[str]
    model: str
    env: str
    score: Score
    curve: Curve | None


def score(words: Sequence[str]) -> int:
    """Print the scores of runs by task, and their aggregate."""
    flags = FlagParser(
        "score",
        "The published statistic of runs: by task, and the interquartile mean of all with a 95 % interval.",
        argument="run",
        argument_help="folders of runs: seeds of one task, or of several tasks",
        many=True,
    )
    flags.group("options", _FLAGS)
    given = flags.parse(words)
    if given.get("statistic", "training") not in _STATISTICS:
        raise ConfigError(f"--statistic is {', '.join(_STATISTICS)}, not '{given['statistic']}'.")
    if given.get("window", 1) < 1:
        raise ConfigError(f"--window is at least 1 environment step, not {given['window']}.")
    runs, remarks = _different(given["run"])
    scored = [_scored(run, given) for run in runs]
    print(*remarks, sep="\n", end="\n" * bool(remarks))
    groups: dict[tuple[str, str | None], dict[str, list[_Run]]] = {}
    for each in scored:
        groups.setdefault((each.model, each.protocol), {}).setdefault(each.env, []).append(each)
    for (model, protocol), tasks in groups.items():
        print(f"{protocol or model}" + ("" if protocol else " (no protocol)"))
        for env, of_task in tasks.items():
            print(*_task_lines(env, of_task), sep="\n")
        print(*_aggregate_lines([[each.score.value for each in of_task] for of_task in tasks.values()]), sep="\n")
    return 0


def _unlike(runs: Sequence[_Run]) -> Iterator[str]:
    """Lines about what keeps ``runs`` from being seeds of one experiment."""
    settings = [each.run.settings() for each in runs]
    trained = [what_is_trained(each) for each in settings]
    names = sorted(set().union(*trained))
    values = {name: list(dict.fromkeys(shown(each.get(name)) for each in trained)) for name in names}
    differing = [f"{name} ({', '.join(found)})" for name, found in values.items() if len(found) > 1]
    if differing:
        yield f"    not seeds of one experiment, they differ in {', '.join(differing)}"
    seeds = [each["training"].get("seed") for each in settings]
    if not differing and (repeated := sorted({seed for seed in seeds if seeds.count(seed) > 1})):
        yield f"    not independent: several runs of seed {', '.join(map(str, repeated))}"


def _different(folders: Sequence[str]) -> tuple[list[RunFolder], list[str]]:
    """The runs in ``folders``, each once, and a remark on each copy of another one."""
    paths: dict[Path, RunFolder] = {}
    for run in map(RunFolder, folders):
        paths.setdefault(run.path.resolve(), run)
    runs: dict[str, RunFolder] = {}
    remarks = []
    for run in paths.values():
        first = runs.setdefault(run.settings()["run_id"], run)
        if first is not run:
            remarks.append(f"{run.path} is the same run as {first.path}, and does not count again")
    return list(runs.values()), remarks


def _scored(run: RunFolder, given: dict[str, Any]) -> _Run:
    settings = run.settings()
    if settings.get("env") is None:
        raise ConfigError(f"{run.path} was trained from recorded episodes: it has no returns to score.")
    experiment = run.experiment()
    rule = experiment.protocol.score if experiment else ScoreRule("evaluation", None, _STATISTICS["evaluation"])
    if "statistic" in given and given["statistic"] != rule.source:
        rule = ScoreRule(given["statistic"], None, _STATISTICS[given["statistic"]])
    records = read_records(run.path / FILE_NAME) if (run.path / FILE_NAME).exists() else []
    episodes = read_episodes(run.path / EPISODES_FILE)
    budget = settings["training"].get("env_steps") or max(
        [line.get("env_steps", 0) for line in (*records, *episodes)], default=0
    )
    at = as_integer("--at", given["at"]) if "at" in given else None
    try:
        found = score_run(rule, episodes, records, budget=budget, at=at, window=given.get("window"))
    except DataError as error:
        raise DataError(f"{run.path}: {error} Other statistics: --statistic {' | '.join(_STATISTICS)}.") from None
    env = settings["env"].get("spec") or settings["env"].get("made_of") or "?"
    followed = settings.get("protocol") or {}
    model = settings["model"]["model_type"]
    curve = run.published_curve()
    return _Run(run, followed.get("name"), list(followed.get("changed", {})), model, env, found, curve)


def _task_lines(env: str, runs: Sequence[_Run]) -> Iterator[str]:
    """Lines about the runs of one task."""
    values = np.array([each.score.value for each in runs])
    spread = f" (from {values.min():.1f} to {values.max():.1f})" if len(values) > 1 else ""
    count = f"{len(values)} run{'s' if len(values) > 1 else ''}"
    yield f"  {env}: {values.mean():.1f}{spread}, {count}; {runs[0].score.text}"
    curve, at = runs[0].curve, runs[0].score.env_steps
    if curve is not None:
        band = published_at(curve, at)
        if band is None:
            yield f"    published: nothing at {at:,} environment steps; the curve ends at {curve.steps[-1]:,} (--at)"
        else:
            mean, low, high = band
            seeds = f" (from {low:.1f} to {high:.1f} over seeds)" if low < high else ""
            yield f"    published: {mean:.1f}{seeds} at {at:,} environment steps"
    ends = {each.score.env_steps for each in runs}
    if len(ends) > 1:
        yield f"    not at the same point: {', '.join(f'{end:,}' for end in sorted(ends))} environment steps (--at)"
    yield from _unlike(runs)
    for each in runs:
        if each.changed:
            yield f"    {each.run.path} changes the protocol: {', '.join(each.changed)}"
    if runs[0].score.rates:
        names = list(dict.fromkeys(name for each in runs for name in each.score.rates))
        rates = {name: np.mean([each.score.rates.get(name, 0.0) for each in runs]) for name in names}
        yield from (f"    {name:22} {rate:6.2f} %" for name, rate in sorted(rates.items(), key=lambda item: -item[1]))


def _aggregate_lines(tasks: Sequence[Sequence[float]]) -> Iterator[str]:
    """The interquartile mean over all runs and tasks, with its interval if there are several runs."""
    everything = [value for runs in tasks for value in runs]
    if len(everything) < 2:
        return
    line = f"  interquartile mean of {len(everything)} runs, {len(tasks)} task{'s' if len(tasks) > 1 else ''}: "
    line += f"{interquartile_mean(everything):.1f}"
    if max(len(runs) for runs in tasks) > 1:
        low, high = bootstrap_interval(tasks)
        line += f", 95 % interval from {low:.1f} to {high:.1f} (stratified bootstrap over runs)"
    yield line
