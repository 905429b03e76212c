"""Plots of imagination against recorded episodes: open-loop images and vectors, and errors by horizon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from worldloom.errors import DataError
from worldloom.models.pictures import picture_layout
from worldloom.models.rollout import task_argument
from worldloom.models.trust import HorizonErrors, check_methods, horizon_errors
from worldloom.replay import ReplayBuffer
from worldloom.report.figure import BLUE, COLOURS, ORANGE, RED, new_figure, save_figure, whole_ticks
from worldloom.report.openloop import OpenLoop, open_loop
from worldloom.spaces import attribute_name

_MAX_SEQUENCES, _MAX_ENTRIES, _MAX_COLUMNS = 3, 12, 16  # of a plot: sequences, entries of a vector, images in a row
_CANDIDATES = 48  # windows that are drawn to find sequences without common rows
_OBSERVED, _IMAGINED = 8, 24  # rows of an open-loop prediction
_UNITS = {"latent": " (in its std)", "reward": " (per step)", "value": " (return)"}
_HORIZON, _HORIZON_SEQUENCES = 15, 256  # imagined steps and sequences behind the errors by horizon


def draw_open_loop(
    report: OpenLoop,
    path: str | Path,
    *,
    name: str | None = None,
    title: str = "",
    entry_names: Sequence[str] = (),
) -> Path:
    """Plot one observation of an open-loop prediction and return the path of the PNG.

    Images become strips of record, prediction and difference with time to the right; those right of the red line are
    imagined. Vectors become a panel per entry with the recorded (solid) and the predicted values (dashed); the imagined
    steps have a grey background. Colours are sequences.

    Args:
      report: from :func:`worldloom.report.openloop.open_loop`.
      path: the PNG file; its folder is created.
      name: the observation to plot; None means the first image, or else the first observation.
      title: text above the plot.
      entry_names: names of the entries of a vector, such as those of :func:`worldloom.envs.names.entry_names`; used if
        they are as many as the entries.

    Raises:
      MissingDependencyError: Matplotlib is missing.
    """
    name = name or next((n for n, x in report.truth.items() if x.ndim == 5), next(iter(report.truth)))
    if report.truth[name].ndim == 5:
        return _draw_images(report, name, Path(path), title)
    size = int(np.prod(report.truth[name].shape[2:]))
    return _draw_vectors(report, name, Path(path), title, entry_names if len(entry_names) == size else ())


def _draw_images(report: OpenLoop, name: str, path: Path, title: str) -> Path:
    truth, prediction = (_channels_last(x[name][:_MAX_SEQUENCES]) for x in (report.truth, report.prediction))
    # Every k-th row, so that at most _MAX_COLUMNS fit side by side.
    shown = np.arange(0, truth.shape[1], -(-truth.shape[1] // _MAX_COLUMNS))
    # Three bands with white gaps; a difference of 0 is grey.
    bands = np.stack([truth, prediction, (prediction - truth + 1) / 2], 1)[:, :, shown]  # [B, 3, T, H, W, C]
    gap = max(1, bands.shape[3] // 32)
    bands = np.pad(bands, [(0, 0), (0, 0), (0, 0), (0, gap), (0, gap), (0, 0)], constant_values=1.0)
    sequences, kinds, columns, height, width, _ = bands.shape
    # Inches: the strips are 9.2 wide, and 0.7 is left for labels.
    figure, axes = new_figure(
        sequences, 1, width=10.0, height=9.2 * sequences * kinds * height / (columns * width) + 0.7 + 0.25 * sequences
    )
    for axis, strip in zip(axes[:, 0], bands, strict=True):
        picture = strip.transpose(0, 2, 1, 3, 4).reshape(kinds * height, columns * width, -1)
        axis.imshow(np.clip(picture, 0, 1), interpolation="nearest", cmap="gray", vmin=0, vmax=1)
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        axis.set_yticks((np.arange(kinds) + 0.5) * height, ["recorded", "model", "difference"], fontsize=8)
        axis.set_xticks((np.arange(columns) + 0.5) * width, [str(row) for row in shown], fontsize=8)
        axis.axvline(np.searchsorted(shown, report.observed) * width - gap / 2 - 0.5, color=RED, linewidth=2)
    for number, axis in enumerate(axes[:, 0], 1):
        axis.set_title(f"sequence {number}", fontsize=9, loc="left")
    axes[-1, 0].set_xlabel(
        "step of the sequence: left of the red line the model observes, right of it it imagines", fontsize=9
    )
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return save_figure(figure, path)


def _draw_vectors(report: OpenLoop, name: str, path: Path, title: str, entry_names: Sequence[str]) -> Path:
    truth, prediction = (x[name][:_MAX_SEQUENCES] for x in (report.truth, report.prediction))
    truth, prediction = (x.reshape(*x.shape[:2], -1) for x in (truth, prediction))
    entries, rows = min(truth.shape[2], _MAX_ENTRIES), np.arange(truth.shape[1])
    columns = 2 if entries in (2, 4) else min(entries, 3)
    lines = -(-entries // columns)
    figure, axes = new_figure(lines, columns, width=max(6.4, 3.4 * columns), height=2.1 * lines + 0.6)
    for entry, axis in enumerate(axes.flat):
        if entry >= entries:
            axis.set_axis_off()
            continue
        grey = axis.axvspan(report.observed - 0.5, rows[-1], color="#eef0f3", linewidth=0)
        axis.margins(x=0)
        for sequence, colour in zip(range(len(truth)), COLOURS, strict=False):
            axis.plot(rows, truth[sequence, :, entry], color=colour, linewidth=1.4, label=f"sequence {sequence + 1}")
            axis.plot(rows, prediction[sequence, :, entry], color=colour, linewidth=1.4, linestyle=(0, (2, 1.5)))
        axis.set_title(entry_names[entry] if entry_names else f"{name}[{entry}]", fontsize=9, loc="left")
        axis.set_xlabel("step of the sequence", fontsize=9)
        whole_ticks(axis)
    lines = axes[0, 0].lines
    handles = [*lines[::2], *_style_samples(), grey]
    labels = [*(line.get_label() for line in lines[::2]), "recorded", "model", "the model imagines"]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    more = "" if entries == truth.shape[2] else f" (the first {entries} of {truth.shape[2]} entries)"
    figure.suptitle(f"{title}{more}", fontsize=10, x=0.01, ha="left")
    return save_figure(figure, path)


def _style_samples() -> list[Any]:
    """Lines for a legend: solid for what was recorded, dashed for what the model predicts."""
    from matplotlib.lines import Line2D

    return [Line2D([], [], color="black", linewidth=1.4, linestyle=style) for style in ("-", (0, (2, 1.5)))]


def draw_imagination(
    model: Any, replay: ReplayBuffer, folder: str | Path, *, title: str = "", entry_names: Sequence[str] = ()
) -> list[Path]:
    """Plot how well ``model`` imagines recorded episodes, and return the paths of the PNGs.

    A model whose ``decode`` returns ``"obs"`` gets an open-loop prediction: ``open_loop.png``, or
    ``open_loop_<name>.png`` for each of several observations (slashes in names become ``%2F``). Any other model gets
    its errors by horizon: ``horizon.png``.

    Raises:
      TypeError: the model lacks a method that imagination needs.
      DataError: no episode has two rows.
      MissingDependencyError: Matplotlib is missing.
    """
    check_methods(model)
    folder, longest = Path(folder), int(max(replay.episode_lengths, default=0))
    if longest < 2:
        raise DataError("There is nothing to imagine: no recorded episode has two rows.")
    rows = min(_OBSERVED + _IMAGINED, longest)
    batch = replay.take(_separate_windows(replay.draw(_CANDIDATES, rows)))
    if not _decodes_observations(model, batch):
        errors = horizon_errors(model, replay.sample(_HORIZON_SEQUENCES, min(_HORIZON + 1, longest)))
        return [draw_horizon_errors(errors, folder / "horizon.png", title=title)]
    report = open_loop(model, batch, observed=min(_OBSERVED, rows // 2))
    single = len(report.truth) == 1
    files = {name: "open_loop.png" if single else f"open_loop_{attribute_name(name)}.png" for name in report.truth}
    return [
        draw_open_loop(report, folder / file, name=name, title=title, entry_names=entry_names)
        for name, file in files.items()
    ]


def _separate_windows(row_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Up to ``_MAX_SEQUENCES`` of the windows [N, T] that have no row in common, in the order given; at least one."""
    chosen = [row_ids[0]]
    for window in row_ids[1:]:
        if len(chosen) < _MAX_SEQUENCES and not np.isin(window, chosen).any():
            chosen.append(window)
    return np.stack(chosen)


def _decodes_observations(model: Any, batch: Mapping[str, Any]) -> bool:
    """Whether ``decode`` returns ``"obs"``, found by abstract evaluation: nothing is computed."""
    task = task_argument(model, batch)
    first = jax.tree.map(lambda x: np.asarray(x)[:, 0], batch["obs"])
    return "obs" in jax.eval_shape(lambda obs: model.decode(model.encode(obs, **task), **task), first)


def draw_horizon_errors(errors: HorizonErrors, path: str | Path, *, title: str = "") -> Path:
    """Plot the errors against the number of imagined steps and return the path of the PNG."""
    count = len(errors.imagined)
    figure, axes = new_figure(1, count, width=3.2 * count, height=2.8)
    plot_horizon_errors(errors, axes[0])
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return save_figure(figure, path)


def plot_horizon_errors(errors: HorizonErrors, axes: NDArray[Any]) -> None:
    """Plot the errors of each quantity into one of ``axes``, as many as there are quantities."""
    for axis, name in zip(axes, errors.imagined, strict=True):
        steps = np.arange(1, len(errors.imagined[name]) + 1)
        axis.plot(steps, errors.imagined[name], color=BLUE, linewidth=1.8, label="imagined")
        axis.plot(
            steps, errors.still[name], color=ORANGE, linewidth=1.4, linestyle="--", label="guess that nothing changes"
        )
        axis.set_ylim(bottom=0)
        whole_ticks(axis)
        axis.set_title(f"error of the imagined {name}{_UNITS.get(name, '')}", fontsize=9, loc="left")
        axis.set_xlabel("imagined steps", fontsize=9)
        axis.set_ylabel("root mean square error", fontsize=9)
    axes[0].legend(frameon=False, fontsize=8)


def _channels_last(images: NDArray[Any]) -> NDArray[Any]:
    """Images [B, T, ...] as [B, T, H, W, 1 or 3]; other numbers of channels (stacked frames) keep the first only."""
    if picture_layout(images.shape[2:]).channels_first:
        images = np.moveaxis(images, 2, -1)
    return images if images.shape[-1] in (1, 3) else images[..., :1]
