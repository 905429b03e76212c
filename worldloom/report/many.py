"""The learning curves of many seeds in one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from worldloom.errors import DataError
from worldloom.report.curves import Record, points
from worldloom.report.figure import COLOURS, count_axis, new_figure, save_figure
from worldloom.report.score import bootstrap_interval, interquartile_mean


def seeds_curve(groups: Mapping[str, Sequence[Sequence[Record]]], path: str | Path, *, title: str = "") -> Path:
    """Plot the interquartile mean over seeds with its 95 % bootstrap interval; returns the path of the PNG.

    Args:
      groups: for each setting the records of its runs, by name. Drawn is the return of evaluations, or of training
        episodes where there are none, at the environment steps that all runs of a setting have.
      path: where to write the picture.
      title: its title.

    Raises:
      DataError: the records hold no returns.
      MissingDependencyError: Matplotlib is missing.
    """
    figure, axes = new_figure()
    axis, drawn = axes[0, 0], 0
    for (name, runs), colour in zip(groups.items(), COLOURS * (1 + len(groups) // len(COLOURS)), strict=False):
        for metric in ("eval/return", "collect/return"):
            curves = [dict(zip(*(each.tolist() for each in points(run, metric)), strict=True)) for run in runs]
            steps = sorted(set.intersection(*map(set, curves))) if curves else []
            if steps:
                break
        else:
            continue
        scores = np.array([[curve[step] for curve in curves] for step in steps])
        intervals = np.array([bootstrap_interval([row], repetitions=2_000) for row in scores])
        axis.fill_between(steps, intervals[:, 0], intervals[:, 1], color=colour, alpha=0.18, linewidth=0)
        means = [interquartile_mean(row) for row in scores]
        axis.plot(
            steps, means, color=colour, linewidth=1.8, marker="o", markersize=3, label=f"{name} ({len(runs)} seeds)"
        )
        drawn += 1
    if not drawn:
        raise DataError("There is no curve to draw: the records hold no returns at the same environment steps.")
    count_axis(axis, "environment steps")
    axis.set_ylabel("return, interquartile mean", fontsize=9)
    axis.set_title(title, fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=8, loc="best")
    return save_figure(figure, path)
