"""Pictures of imagination beside what really happened: images, vectors, and errors by horizon."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from worldloom.errors import DataError
from worldloom.replay import ReplayBuffer
from worldloom.report.figure import BLUE, COLOURS, ORANGE, RED, new_figure, save_figure, whole_ticks
from worldloom.report.openloop import OpenLoop, open_loop

_SEQUENCES, _ENTRIES, _COLUMNS = 3, 12, 16
_OBSERVED, _IMAGINED, _HORIZON = 8, 24, 15


def draw_open_loop(report: OpenLoop, path: str | Path, *, name: str | None = None, title: str = "") -> Path:
    """Draw one observation of an open-loop prediction and return the path of the PNG.

    Images become rows of truth, prediction and difference, time to the right, and what lies right of the red line was
    imagined. Vectors become a panel per entry with what happened (solid) and what was predicted (dashed), imagined on
    grey ground.

    Args:
      report: from :func:`worldloom.report.openloop.open_loop`.
      path: the file; its folder is made.
      name: which observation; None is the first image, or else the first.
      title: above the picture.

    Raises ``MissingDependencyError`` without Matplotlib.
    """
    name = name or next((n for n, x in report.truth.items() if x.ndim == 5), next(iter(report.truth)))
    draw = _draw_images if report.truth[name].ndim == 5 else _draw_vectors
    return draw(report, name, Path(path), title)


def _draw_images(report: OpenLoop, name: str, path: Path, title: str) -> Path:
    truth, prediction = (_channels_last(x[name][:_SEQUENCES]) for x in (report.truth, report.prediction))
    shown = np.arange(0, truth.shape[1], -(-truth.shape[1] // _COLUMNS))
    bands = np.stack([truth, prediction, (prediction - truth + 1) / 2], 1)[:, :, shown]  # [B, 3, T, H, W, C]
    gap = max(1, bands.shape[3] // 32)
    bands = np.pad(bands, [(0, 0), (0, 0), (0, 0), (0, gap), (0, gap), (0, 0)], constant_values=1.0)
    sequences, kinds, columns, height, width, _ = bands.shape
    figure, axes = new_figure(
        sequences, 1, width=10.0, height=9.2 * sequences * kinds * height / (columns * width) + 0.7
    )
    for axis, strip in zip(axes[:, 0], bands, strict=True):
        picture = strip.transpose(0, 2, 1, 3, 4).reshape(kinds * height, columns * width, -1)
        axis.imshow(np.clip(picture, 0, 1), interpolation="nearest", cmap="gray", vmin=0, vmax=1)
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        axis.set_yticks((np.arange(kinds) + 0.5) * height, ["truth", "model", "difference"], fontsize=8)
        axis.set_xticks((np.arange(columns) + 0.5) * width, [str(row) for row in shown], fontsize=8)
        axis.axvline(np.searchsorted(shown, report.observed) * width - gap / 2 - 0.5, color=RED, linewidth=2)
    axes[-1, 0].set_xlabel("row (left of the line observed, right of it imagined)", fontsize=9)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return save_figure(figure, path)


def _draw_vectors(report: OpenLoop, name: str, path: Path, title: str) -> Path:
    truth, prediction = (x[name][:_SEQUENCES] for x in (report.truth, report.prediction))
    truth, prediction = (x.reshape(*x.shape[:2], -1) for x in (truth, prediction))
    entries, rows = min(truth.shape[2], _ENTRIES), np.arange(truth.shape[1])
    columns = 2 if entries in (2, 4) else min(entries, 3)
    lines = -(-entries // columns)
    figure, axes = new_figure(lines, columns, width=max(6.4, 3.4 * columns), height=2.1 * lines + 0.6)
    for entry, axis in enumerate(axes.flat):
        if entry >= entries:
            axis.set_axis_off()
            continue
        axis.axvspan(report.observed - 0.5, rows[-1], color="#eef0f3", linewidth=0)
        axis.margins(x=0)
        for sequence, colour in zip(range(len(truth)), COLOURS, strict=False):
            axis.plot(rows, truth[sequence, :, entry], color=colour, linewidth=1.4)
            axis.plot(rows, prediction[sequence, :, entry], color=colour, linewidth=1.4, linestyle=(0, (2, 1.5)))
        axis.set_title(f"{name}[{entry}]", fontsize=9, loc="left")
        whole_ticks(axis)
    for axis in axes[-1]:
        axis.set_xlabel("row", fontsize=9)
    more = "" if entries == truth.shape[2] else f"; the first {entries} of {truth.shape[2]} entries"
    legend = f"solid: what happened; dashed: the model, on grey ground imagining{more}"
    figure.suptitle(f"{title}\n{legend}" if title else legend, fontsize=9, x=0.01, ha="left")
    return save_figure(figure, path)


class HorizonErrors(NamedTuple):
    """Root mean square errors of imagination after 1 … H steps, by quantity, [H] each.

    Attributes:
      imagined: of the model: ``reward`` and ``value`` in the units of the data, ``latent`` as a share of the latents'
        own spread.
      still: of the guess that nothing changes, likewise.
    """

    imagined: dict[str, NDArray[np.float64]]
    still: dict[str, NDArray[np.float64]]


def draw_imagination(model: Any, replay: ReplayBuffer, folder: str | Path, *, title: str = "") -> list[Path]:
    """Draw how far the imagination of ``model`` can be trusted on recorded episodes, and return the paths of the PNGs.

    For a model with a decoder (DreamerV3) ``open_loop.png``, or with several observations one ``open_loop_<name>.png``
    each; for others (TD-MPC2) ``horizon.png``.

    Raises:
      DataError: no episode has two rows.
      MissingDependencyError: Matplotlib is missing.
    """
    folder, longest = Path(folder), int(max(replay.episode_lengths, default=0))
    if longest < 2:
        raise DataError("There is nothing to imagine: no recorded episode has two rows.")
    if not hasattr(model, "decoder"):
        errors = horizon_errors(model, replay.sample(256, min(_HORIZON + 1, longest)))
        return [draw_horizon_errors(errors, folder / "horizon.png", title=title)]
    rows = min(_OBSERVED + _IMAGINED, longest)
    report = open_loop(model, replay.sample(_SEQUENCES, rows), observed=min(_OBSERVED, rows // 2))
    files = {name: "open_loop.png" if len(report.truth) == 1 else f"open_loop_{name}.png" for name in report.truth}
    return [
        draw_open_loop(report, folder / file.replace("/", "_"), name=name, title=title) for name, file in files.items()
    ]


def horizon_errors(model: Any, batch: Mapping[str, Any]) -> HorizonErrors:
    """How far a model without decoder, such as TD-MPC2, can imagine.

    From the first row of every sequence it imagines with the recorded actions. Its latents and their values are
    compared with those of the observations that really came, its rewards with the recorded ones.

    Args:
      model: a world model whose states depend on one observation alone, with ``value`` among what it decodes.
      batch: ``obs``, ``actions`` and ``rewards`` [B, T, ...] by the arrival rule, inside episodes; H is T − 1.

    Raises ``DataError`` for sequences of a single row.
    """
    obs, actions = np.asarray(batch["obs"]), np.asarray(batch["actions"])
    sequences, length = obs.shape[:2]
    if length < 2:
        raise DataError("Sequences need at least 2 rows to imagine a step.")
    task = {"task": np.asarray(batch["task"])} if getattr(model.config, "num_tasks", 0) else {}
    tasks = {name: np.repeat(value, length) for name, value in task.items()}
    seen = model.encode(obs.reshape(-1, *obs.shape[2:]), **tasks)
    dream = model.imagine(model.encode(obs[:, 0], **task), np.swapaxes(actions[:, :-1], 0, 1), **task)
    by_time = lambda x: np.swapaxes(np.asarray(x, np.float64).reshape(sequences, length, *x.shape[1:]), 0, 1)  # noqa: E731
    rewards = np.swapaxes(np.asarray(batch["rewards"], np.float64), 0, 1)
    values = jax.device_get([model.decode(seen, **tasks)["value"], model.decode(dream.states, **task)["value"]])
    latents = by_time(seen.features)
    truth = {"reward": rewards, "value": by_time(values[0]), "latent": latents}
    imagined = {
        "reward": np.concatenate([rewards[:1], np.asarray(dream.rewards, np.float64)]),
        "value": np.asarray(values[1], np.float64),
        "latent": np.asarray(dream.states.features, np.float64),
    }
    spread = np.sqrt(latents.var((0, 1)).mean()) or 1.0
    unit = {"reward": 1.0, "value": 1.0, "latent": spread}

    def errors(guess: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        return {name: _rms(guess[name] - truth[name])[1:] / unit[name] for name in truth}

    return HorizonErrors(errors(imagined), errors({name: x[:1] for name, x in truth.items()}))


def draw_horizon_errors(errors: HorizonErrors, path: str | Path, *, title: str = "") -> Path:
    """Draw the errors against the number of imagined steps, and return the path of the PNG."""
    names = list(errors.imagined)
    figure, axes = new_figure(1, len(names), width=3.2 * len(names), height=2.8)
    for axis, name in zip(axes[0], names, strict=True):
        steps = np.arange(1, len(errors.imagined[name]) + 1)
        axis.plot(steps, errors.imagined[name], color=BLUE, linewidth=1.8, label="imagined")
        axis.plot(steps, errors.still[name], color=ORANGE, linewidth=1.4, linestyle="--", label="nothing changes")
        axis.set_ylim(bottom=0)
        whole_ticks(axis)
        axis.set_title(f"{name} (in its spread)" if name == "latent" else name, fontsize=9, loc="left")
        axis.set_xlabel("imagined steps", fontsize=9)
    axes[0, 0].set_ylabel("root mean square error", fontsize=9)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return save_figure(figure, path)


def _channels_last(images: NDArray[Any]) -> NDArray[Any]:
    """[B, T, ...] images as [B, T, H, W, 1 or 3]; of other channel counts (stacked frames) the first."""
    if images.shape[2] < images.shape[3]:
        images = np.moveaxis(images, 2, -1)
    return images if images.shape[-1] in (1, 3) else images[..., :1]


def _rms(errors: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sqrt(np.mean(np.square(errors), axis=tuple(range(1, errors.ndim))))
