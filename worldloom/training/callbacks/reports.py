"""Evaluations with videos, plots and a summary page, written to a run's folder."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.algorithm import Curve
from worldloom.envs import VectorEnv
from worldloom.envs.names import entry_names
from worldloom.files import absolute_path
from worldloom.replay import ReplayBuffer
from worldloom.report.curves import learning_curve, read_records
from worldloom.report.imagination import draw_imagination
from worldloom.report.recording import Recording
from worldloom.report.summary import SUMMARY_FILE, write_summary
from worldloom.report.trust import draw_trust
from worldloom.report.video import save_gif
from worldloom.training.callbacks.base import Callback, CallbackResult, StepInfo
from worldloom.training.callbacks.logs import FILE_NAME, print_line
from worldloom.training.config import TrainingConfig
from worldloom.training.evaluation import measure_returns

_log = logging.getLogger("worldloom")
_MAX_ROWS = 20_000
"""Rows of the newest evaluation that are kept for plots of the model's predictions."""
_MAX_FRAMES = 1_500
"""Frames of a video: one minute at 25 per second."""


class FrameRecorder(list[np.ndarray]):
    """The first ``_MAX_FRAMES`` frames of an episode, as ``play`` appends them."""

    def append(self, frame: np.ndarray) -> None:
        """Add ``frame``, unless the maximum is reached."""
        if len(self) < _MAX_FRAMES:
            super().append(frame)


class EvalReportCallback(Callback):
    """Plays whole episodes with the evaluation policy, as ``EvalCallback`` does, and writes a video and plots of them.

    Publishes the same measurements. Writes ``eval.gif`` of the first episode, and
    plots of the model's predictions in these episodes, see :func:`worldloom.report.imagination.draw_imagination` and
    :func:`worldloom.report.trust.draw_trust`.

    Args:
      env: environments used for nothing else; made with ``render=True`` for a video.
      folder: folder of the video and the plots.
      title: function () → title of the plots.
      episodes: number of episodes per evaluation; None follows ``TrainingConfig.eval_episodes``.
      seed: determines the episodes.
    """

    order = -1
    measures = True

    def __init__(
        self,
        env: VectorEnv,
        folder: str | Path,
        title: Callable[[], str],
        *,
        episodes: int | None = None,
        seed: int = 0,
    ):
        self.env, self.folder, self.title, self.episodes, self.seed = env, absolute_path(folder), title, episodes, seed
        self.step: int | None = None
        self._records_video = True

    def interval(self, config: TrainingConfig) -> int:
        """``config.eval_interval``."""
        return config.eval_interval

    def state_dict(self) -> dict[str, Any]:
        """The step of the newest evaluation."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.step = state.get("step")

    def on_step(self, info: StepInfo) -> CallbackResult:
        """Evaluate and publish the results."""
        # Play and record.
        model, replay, frames = info.model(), ReplayBuffer(_MAX_ROWS), FrameRecorder()
        self._records_video = self._records_video and can_render(self.env, self.seed)
        recorded = frames if self._records_video else None
        measured = measure_returns(
            model,
            self.env,
            info.config,
            episodes=self.episodes,
            seed=self.seed + info.step,
            frames=recorded,
            recorder=lambda env: Recording(env, replay),
        )
        self.step = info.step
        # Video, plots, measurements.
        if frames:
            draw_or_warn("eval.gif", lambda: save_gif(frames, self.folder / "eval.gif"))
        title, names = f"{self.title()}, {info.env_steps:,} environment steps", entry_names(self.env.settings["spec"])
        draw_predictions(model, replay, self.folder, lambda: title, names)
        return measured


class EndEvaluation(Callback):
    """Evaluates the weights before the first update and after the last one, as the config says.

    The final weights are evaluated unless they just were, and only if training reached ``total_steps``: stops and
    interrupts should be quick. That is before the last checkpoint, so that a run which is killed meanwhile does it when
    it is resumed.
    """

    every = 0
    order = 0
    measures = True

    def __init__(self, evaluation: EvalReportCallback):
        self.evaluation = evaluation

    def on_train_begin(self, info: StepInfo) -> CallbackResult:
        """Evaluate the untrained weights and publish the results, if the config says so."""
        return self.evaluation.on_step(info) if info.config.eval_at_start and info.step == 0 else None

    def on_train_end(self, info: StepInfo) -> CallbackResult:
        """Evaluate the final weights and publish the results, if the config says so."""
        due = info.config.eval_at_end and info.step >= info.total_steps and info.step != self.evaluation.step
        return self.evaluation.on_step(info) if due else None


class CurveCallback(Callback):
    """Plots ``learning_curve.png`` from the ``metrics.jsonl`` in its folder after every evaluation and at the end.

    ``summary.html`` is written with it, see :func:`worldloom.report.summary.write_summary`.

    Args:
      folder: folder of a ``LoggingCallback``, which must run before this callback.
      title: function () → title of the plots.
      held_out: recorded episodes; if given, the model's predictions of them are plotted too.
      published: function () → the published curve to draw behind the run's, or None.
    """

    every = 0
    order = 2

    def __init__(
        self,
        folder: str | Path,
        title: Callable[[], str],
        held_out: ReplayBuffer | None = None,
        *,
        published: Callable[[], Curve | None] = lambda: None,
    ):
        self.folder, self.title, self.held_out, self.published = absolute_path(folder), title, held_out, published

    def on_train_begin(self, info: StepInfo) -> CallbackResult:
        """Warn once about missing packages."""
        missing = [name for name in ("matplotlib", "PIL") if not _installed(name)]
        if missing:
            _log.warning("No curves or no video without %s: pip install 'worldloom[video]'.", " and ".join(missing))
        return None

    def on_eval(self, info: StepInfo, measurements: Mapping[str, float]) -> CallbackResult:
        """Update the plots after an evaluation."""
        if any(name.startswith("eval/") for name in measurements):
            self._plot(info)
        return None

    def on_train_end(self, info: StepInfo) -> CallbackResult:
        """Update the plots."""
        self._plot(info)
        return None

    def _plot(self, info: StepInfo) -> None:
        draw_or_warn("learning_curve.png", self._plot_curve)
        if self.held_out is not None:
            title = lambda: f"{self.title()}, {info.step:,} updates"  # noqa: E731
            draw_predictions(info.model(), self.held_out, self.folder, title)
        draw_or_warn(SUMMARY_FILE, lambda: write_summary(self.folder))

    def _plot_curve(self) -> None:
        records = read_records(self.folder / FILE_NAME)
        if any({"eval/return", "collect/return", "train/loss"} & record.keys() for record in records):
            path, published = self.folder / "learning_curve.png", self.published()
            learning_curve(records, path, title=self.title(), published=published)


class EvalPrinter(Callback):
    """Prints a line for every evaluation."""

    every = 0

    def on_eval(self, info: StepInfo, measurements: Mapping[str, float]) -> CallbackResult:
        """Print it, above a progress bar."""
        if "eval/return" in measurements:
            value, spread = measurements["eval/return"], measurements["eval/return_std"]
            collected = info.measurements.get("collect/return")
            greedy = measurements.get("eval/greedy_return")
            print_line(
                f"env steps {info.env_steps:>9,}   updates {info.step:>9,}   return {value:9.1f} ± {spread:<7.1f}"
                + ("" if greedy is None else f" greedy {greedy:.1f}")
                + ("" if collected is None else f" while collecting {collected:.1f}")
            )
        elif "eval/loss" in measurements:
            print_line(f"updates {info.step:>9,}   loss on held-out episodes {measurements['eval/loss']:.4g}")
        return None


def can_render(env: VectorEnv, seed: int) -> bool:
    """Whether ``env`` renders images and the package that writes them is installed; resets ``env``."""
    if not _installed("PIL"):
        return False
    try:
        env.reset(seed=seed)
        env.render()
    except Exception as error:  # Simulators without graphics raise exceptions of any type.
        _log.warning("There will be no video: %s", error)
        return False
    return True


def draw_predictions(
    model: Any, replay: ReplayBuffer, folder: Path, title: Callable[[], str], entry_names: Sequence[str] = ()
) -> None:
    """Plot what ``model`` predicts in recorded episodes, and how far it can be trusted there."""
    draw_or_warn("imagination", lambda: draw_imagination(model, replay, folder, title=title(), entry_names=entry_names))
    draw_or_warn("trust.png", lambda: draw_trust(model, replay, folder, title=title()))


def draw_or_warn(name: str, draw: Callable[[], Any]) -> None:
    """Call ``draw`` if its package is installed; an exception is logged as a warning, so that the run continues."""
    needs = {"eval.gif": "PIL", SUMMARY_FILE: None}.get(name, "matplotlib")
    if needs and not _installed(needs):
        return
    try:
        draw()
    except Exception as error:
        _log.warning("%s was not drawn: %s", name, error)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
