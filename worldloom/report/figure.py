"""Matplotlib figures through its object interface: no display is opened and no global state is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from worldloom.errors import MissingDependencyError
from worldloom.files import atomic_file

BLUE, ORANGE, GREEN, RED, GREY = "#2f6db5", "#d9822b", "#3a8f4d", "#c23b3b", "#8a8f98"
COLOURS = (BLUE, ORANGE, GREEN, RED, "#7d5ba6", "#5f9ea0")


def new_figure(rows: int = 1, columns: int = 1, *, width: float = 6.4, height: float = 3.4) -> tuple[Any, np.ndarray]:
    """A figure of ``width`` × ``height`` inches and its axes [rows, columns].

    Raises ``MissingDependencyError`` if Matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("Pictures need Matplotlib: pip install 'worldloom[video]'.") from error
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e6e8eb", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8, color="#b0b5bc")
    return figure, axes


def count_axis(axis: Any, label: str) -> None:
    """Label an x-axis of counts and format its ticks: ``20 k`` instead of ``20000``."""
    from matplotlib.ticker import EngFormatter

    axis.set_xlabel(label, fontsize=9)
    whole_ticks(axis)
    axis.xaxis.set_major_formatter(EngFormatter(sep=" "))


def whole_ticks(axis: Any) -> None:
    """Place the ticks of an x-axis at round integers."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a PNG atomically and return its path; missing folders are created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(file, format="png")
    return path
