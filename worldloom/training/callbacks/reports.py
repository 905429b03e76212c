"""Evaluations that leave pictures behind, for a run's folder."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.envs import VectorEnv
from worldloom.replay import ReplayBuffer
from worldloom.report.curves import learning_curve, read_records
from worldloom.report.imagination import draw_imagination
from worldloom.report.recording import Recording
from worldloom.report.trust import draw_trust
from worldloom.report.video import save_gif
from worldloom.training.callbacks.base import Callback, CallbackResult, StepInfo
from worldloom.training.callbacks.logs import FILE_NAME
from worldloom.training.config import TrainingConfig
from worldloom.training.evaluation import play

_log = logging.getLogger("worldloom")
_ROWS, _FRAMES = 20_000, 1_500


class FrameRecorder(list[np.ndarray]):
    """Pictures of an episode, as ``play`` appends them: the first minute of it (at 25 a second)."""

    def append(self, frame: np.ndarray) -> None:
        """Keep ``frame``, unless there are enough."""
        if len(self) < _FRAMES:
            super().append(frame)


class EvalReportCallback(Callback):
    """Plays whole episodes with the evaluation policy, as ``EvalCallback`` does, and shows them.

    Publishes ``eval/return``, ``eval/return_std`` and ``eval/length``, and writes to the folder ``eval.gif`` of the
    first episode and how well the model imagines these episodes, see
    :func:`worldloom.report.imagination.draw_imagination` and :func:`worldloom.report.trust.draw_trust`.

    Args:
      env: environments that nobody else steps; made with ``render=True`` for a video.
      folder: where the pictures go.
      title: function () → what the run is, above the pictures.
      episodes: how many an evaluation plays.
      seed: which ones.
    """

    order = -1
    measures = True

    def __init__(
        self, env: VectorEnv, folder: str | Path, title: Callable[[], str], *, episodes: int = 10, seed: int = 0
    ):
        self.env, self.folder, self.title, self.episodes, self.seed = env, Path(folder), title, episodes, seed
        self.step: int | None = None
        self._films = True

    def interval(self, config: TrainingConfig) -> int:
        """``config.eval_interval``."""
        return config.eval_interval

    def on_step(self, info: StepInfo) -> CallbackResult:
        """Evaluate the weights of this step."""
        model, replay, film = info.model(), ReplayBuffer(_ROWS), FrameRecorder()
        env: Any = Recording(self.env, replay)
        self._films = self._films and draws(self.env, self.seed)
        frames = film if self._films else None
        ends = play(model, env, episodes=self.episodes, seed=self.seed + info.step, frames=frames)
        self.step = info.step
        if film:
            attempt("eval.gif", lambda: save_gif(film, self.folder / "eval.gif"))
        title = f"{self.title()}, {info.env_steps:,} environment steps"
        attempt("imagination", lambda: draw_imagination(model, replay, self.folder, title=title))
        attempt("trust.png", lambda: draw_trust(model, replay, self.folder, title=title))
        returns = [end.episode_return for end in ends]
        return {
            "eval/return": float(np.mean(returns)),
            "eval/return_std": float(np.std(returns)),
            "eval/length": float(np.mean([end.length for end in ends])),
        }


class FinalEvaluation(Callback):
    """Evaluates once more where training is done, unless that was just evaluated.

    It comes after the last checkpoint, and not at all when training was stopped or interrupted: that should be quick.
    """

    every = 0
    order = 2
    measures = True

    def __init__(self, evaluation: EvalReportCallback):
        self.evaluation = evaluation

    def on_train_end(self, info: StepInfo) -> CallbackResult:
        """Evaluate."""
        done = info.step >= info.total_steps and info.step != self.evaluation.step
        return self.evaluation.on_step(info) if done else None


class CurveCallback(Callback):
    """Draws ``learning_curve.png`` from the ``metrics.jsonl`` in its folder after every evaluation and at the end.

    Args:
      folder: of a ``LoggingCallback``, which comes earlier in the list.
      title: function () → what the run is, above the pictures.
      held_out: recorded episodes; then how well the model imagines them is drawn too.
    """

    every = 0
    order = 2

    def __init__(self, folder: str | Path, title: Callable[[], str], held_out: ReplayBuffer | None = None):
        self.folder, self.title, self.held_out = Path(folder), title, held_out

    def on_train_begin(self, info: StepInfo) -> CallbackResult:
        """Say once what will be missing."""
        missing = [name for name in ("matplotlib", "PIL") if not _installed(name)]
        if missing:
            _log.warning("No curves or no video without %s: pip install 'worldloom[video]'.", " and ".join(missing))
        return None

    def on_eval(self, info: StepInfo, measurements: Mapping[str, float]) -> CallbackResult:
        """Draw, if this was an evaluation."""
        if any(name.startswith("eval/") for name in measurements):
            self._draw(info)
        return None

    def on_train_end(self, info: StepInfo) -> CallbackResult:
        """Draw."""
        self._draw(info)
        return None

    def _draw(self, info: StepInfo) -> None:
        records = read_records(self.folder / FILE_NAME)
        if any({"eval/return", "collect/return", "train/loss"} & record.keys() for record in records):
            path = self.folder / "learning_curve.png"
            attempt(path.name, lambda: learning_curve(records, path, title=self.title()))
        if self.held_out is not None:
            title, held_out = f"{self.title()}, {info.step:,} updates", self.held_out
            model = info.model()
            attempt("imagination", lambda: draw_imagination(model, held_out, self.folder, title=title))
            attempt("trust.png", lambda: draw_trust(model, held_out, self.folder, title=title))


class EvalPrinter(Callback):
    """Prints a line for every evaluation."""

    every = 0

    def on_eval(self, info: StepInfo, measurements: Mapping[str, float]) -> CallbackResult:
        """Print it, above a progress bar."""
        from tqdm.auto import tqdm

        if "eval/return" in measurements:
            value, spread = measurements["eval/return"], measurements["eval/return_std"]
            collected = info.measurements.get("collect/return")
            tqdm.write(
                f"env steps {info.env_steps:>9,}   updates {info.step:>9,}   return {value:9.1f} ± {spread:<7.1f}"
                + ("" if collected is None else f" while collecting {collected:.1f}")
            )
        elif "eval/loss" in measurements:
            tqdm.write(f"updates {info.step:>9,}   loss on held-out episodes {measurements['eval/loss']:.4g}")
        return None


def draws(env: VectorEnv, seed: int) -> bool:
    """Whether ``env`` draws pictures, and they can be written; resets it."""
    if not _installed("PIL"):
        return False
    try:
        env.reset(seed=seed)
        env.render()
    except Exception as error:  # Whatever a simulator without graphics raises.
        _log.warning("There will be no video: %s", error)
        return False
    return True


def attempt(what: str, draw: Callable[[], Any]) -> None:
    """Draw a picture. One that cannot be drawn costs a warning, never the run."""
    if not _installed("matplotlib" if what != "eval.gif" else "PIL"):
        return
    try:
        draw()
    except Exception as error:
        _log.warning("%s was not drawn: %s", what, error)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
