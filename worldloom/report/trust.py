"""A picture of how far imagination can be believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from worldloom.errors import DataError
from worldloom.models.trust import Trust
from worldloom.replay import ReplayBuffer
from worldloom.report.figure import BLUE, GREY, new_figure, save_figure, whole_ticks
from worldloom.report.imagination import plot_horizon_errors
from worldloom.spaces import OBS, named

_SEQUENCES, _SEQUENCES_OF_IMAGES, _ROWS = 256, 32, 16


def draw_trust(model: Any, replay: ReplayBuffer, folder: str | Path, *, title: str = "") -> Path:
    """Plot ``model.trust`` of 256 windows of 16 rows and return the path of the PNG, ``trust.png`` in ``folder``.

    Windows are no longer than the longest episode; of images there are 32.

    Raises:
      DataError: no episode has two rows.
      TypeError: the model lacks a method that imagination needs.
      MissingDependencyError: Matplotlib is missing.
    """
    longest = int(max(replay.episode_lengths, default=0))
    if longest < 2:
        raise DataError("There is nothing to imagine: no recorded episode has two rows.")
    images = any(len(shape) == 3 for shape in named(replay.obs_shape, OBS).values())
    batch = replay.sample(_SEQUENCES_OF_IMAGES if images else _SEQUENCES, min(_ROWS, longest))
    return plot_trust(model.trust(batch), Path(folder) / "trust.png", title=title)


def plot_trust(trust: Trust, path: str | Path, *, title: str = "") -> Path:
    """Plot each signal against the row of its sequence, then the errors of imagination by the number of steps.

    Of a signal the median of the B sequences is a line, their 10th to 90th percentiles are a band.
    """
    panels = len(trust.rows) + len(trust.errors.imagined)
    columns = min(panels, 2)
    lines = -(-panels // columns)
    figure, axes = new_figure(lines, columns, width=3.9 * columns, height=2.6 * lines + 0.3)
    for axis in axes.flat[panels:]:
        axis.set_axis_off()
    for axis, (name, signal) in zip(axes.flat, trust.rows.items(), strict=False):
        low, median, high = np.percentile(signal, (10, 50, 90), axis=0)
        rows = np.arange(signal.shape[1])
        axis.fill_between(rows, low, high, color=GREY, alpha=0.3, linewidth=0, label="10 to 90 % of sequences")
        axis.plot(rows, median, color=BLUE, linewidth=1.8, label="median")
        axis.set_ylim(bottom=0)
        whole_ticks(axis)
        axis.set_title(
            f"the model's own signal: {name.replace('_', ' ')} ({trust.units[name]})", fontsize=9, loc="left"
        )
        axis.set_xlabel("step of the recorded sequence", fontsize=9)
        axis.legend(frameon=False, fontsize=8)
    plot_horizon_errors(trust.errors, axes.flat[len(trust.rows) : panels])
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return save_figure(figure, path)
