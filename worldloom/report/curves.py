"""Learning curves from the metrics of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldloom.algorithm import Curve
from worldloom.errors import DataError
from worldloom.report.figure import BLUE, COLOURS, GREY, ORANGE, count_axis, new_figure, save_figure

Record = Mapping[str, Any]
Points = tuple[NDArray[np.float64], NDArray[np.float64]]


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Records of a ``metrics.jsonl`` file; lines that are not JSON objects (a truncated last line) are skipped."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def points(records: Iterable[Record], name: str) -> Points:
    """x and y of a metric, [N] each; non-finite y are NaN.

    x is environment steps in a run that takes any, 0 as long as it learns from data first, and else updates. Of several
    records at one x, as in the burst of updates after the prefill, the last one counts.
    """
    # LoggingCallback writes null for NaN and infinities, which JSON lacks.
    records = list(records)
    axis = "env_steps" if any(record.get("env_steps") for record in records) else "step"
    found = {
        record.get(axis, record["step"]): np.nan if record[name] is None else record[name]
        for record in records
        if name in record
    }
    return np.array([*found], float), np.array([*found.values()], float)


def learning_curve(
    records: Sequence[Record], path: str | Path, *, title: str = "", published: Curve | None = None
) -> Path:
    """Plot the learning curve of a run and return the path of the PNG.

    If the records hold returns: evaluation return (mean ± standard deviation over episodes) and return while
    collecting, against environment steps, in front of the ``published`` curve, if one is given: its mean, and the band
    between its worst and best seed. Otherwise: the loss and every loss term on training and held-out data,
    against updates.

    Raises:
      DataError: the records hold neither returns nor losses.
      MissingDependencyError: Matplotlib is missing.
    """
    if any("eval/return" in record or "collect/return" in record for record in records):
        return _draw_returns(records, path, title, published)
    if any("train/loss" in record for record in records):
        return _draw_losses(records, path, title)
    raise DataError("There is no curve to draw: the records hold neither returns nor losses.")


def _draw_returns(records: Sequence[Record], path: str | Path, title: str, published: Curve | None) -> Path:
    figure, axes = new_figure()
    axis = axes[0, 0]
    if published is not None:
        axis.fill_between(published.steps, published.low, published.high, color=GREY, alpha=0.25, linewidth=0)
        axis.plot(
            published.steps,
            published.mean,
            color=GREY,
            linewidth=1.2,
            linestyle="--",
            label="published: mean, worst and best seed",
        )
    x, y = points(records, "collect/return")
    if len(x):
        axis.plot(x, y, color=ORANGE, linewidth=1.0, alpha=0.75, label="training episodes")
    x, y = points(records, "eval/return")
    if len(x):
        spread = points([record for record in records if "eval/return" in record], "eval/return_std")[1]
        if len(spread) == len(y):
            axis.fill_between(x, y - spread, y + spread, color=BLUE, alpha=0.18, linewidth=0)
        axis.plot(
            x, y, color=BLUE, linewidth=1.8, marker="o", markersize=3, label="evaluation: mean ± std over episodes"
        )
    count_axis(axis, "environment steps" if _is_online(records) else "updates")
    axis.set_ylabel("return of an episode", fontsize=9)
    axis.set_title(title, fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=8, loc="best")
    return save_figure(figure, path)


def _draw_losses(records: Sequence[Record], path: str | Path, title: str) -> Path:
    prefix = "train/loss/"
    # A term that a model does not have (terminations that never happen) is 0 throughout.
    terms = [name for name in _names(records) if name.startswith(prefix) and np.any(points(records, name)[1] != 0)]
    rows = -(-(1 + len(terms)) // 3)  # the total and its terms, three panels in a row
    figure, axes = new_figure(rows, 3, width=9.6, height=2.2 * rows + 0.3)
    for index, axis in enumerate(axes.flat):
        if index > len(terms):
            axis.set_axis_off()
            continue
        name = "train/loss" if index == 0 else terms[index - 1]
        x, y = points(records, name)
        axis.plot(x, y, color=COLOURS[0], linewidth=1.4, label="training")
        x, y = points(records, name.replace("train/", "eval/"))
        if len(x):
            axis.plot(x, y, color=ORANGE, linewidth=1.4, marker="o", markersize=3, label="held-out episodes")
        axis.set_title("total loss" if index == 0 else name.removeprefix(prefix), fontsize=9, loc="left")
        count_axis(axis, "updates")
        axis.axhline(0, color=GREY, linewidth=0.6)
    if len(axes.flat[0].lines) > 2:
        axes.flat[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return save_figure(figure, path)


def _is_online(records: Iterable[Record]) -> bool:
    return any(record.get("env_steps") for record in records)


def _names(records: Iterable[Record]) -> list[str]:
    """Names of all metrics in order of first appearance."""
    return list(dict.fromkeys(name for record in records for name in record))
