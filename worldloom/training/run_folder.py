"""Everything about one run in one folder."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from worldloom.config import read_json_object
from worldloom.envs import EnvSpaces, VectorEnv, make_env
from worldloom.errors import CheckpointError, ConfigError, FileFormatError
from worldloom.files import write_atomically
from worldloom.training.callbacks import (
    Callback,
    CallbackResult,
    CheckpointCallback,
    EvalCallback,
    LoggingCallback,
    ProgressCallback,
    StepInfo,
)
from worldloom.training.callbacks.reports import CurveCallback, EvalPrinter, EvalReportCallback, FinalEvaluation
from worldloom.training.config import TrainingConfig
from worldloom.training.run_info import versions

_log = logging.getLogger("worldloom")
_FORMAT = 1
_MOST_ENVS = 10
"""Environments that an evaluation steps together."""
_SIMULATORS = ("gymnasium", "dm-control", "mujoco", "ale-py", "crafter", "shimmy")


class RunFolder:
    """A folder that holds what a run is, how it went and what it became::

        runs/pendulum/
          config.json           model, training and environment: all that makes the run again
          versions.json         a record per start: packages, git revision, device, command
          metrics.jsonl         see LoggingCallback; TensorBoard's events lie beside it
          checkpoints/          see CheckpointCallback
          model/                the weights at the end, for create_world_model
          learning_curve.png    returns, or losses when there is no environment
          eval.gif              the first episode of the newest evaluation
          open_loop*.png        DreamerV3: what it imagines beside what happened there
          horizon.png           TD-MPC2: errors of reward, value and latent there by imagined steps

    Hand its callbacks to a trainer::

        env, run = make_env("Pendulum-v1"), RunFolder("runs/pendulum")
        Trainer(model, config, run.callbacks(env)).train(env, resume="auto")

    Args:
      path: the folder; created when training begins.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    @property
    def exists(self) -> bool:
        """Whether a run was recorded here."""
        return (self.path / "config.json").is_file()

    def settings(self) -> dict[str, Any]:
        """``config.json``: ``run_id``, and dicts ``model``, ``training``, ``env`` and ``spaces`` (None without one).

        Raises ``FileFormatError`` if there is none, or none that this version reads.
        """
        if not self.exists:
            raise FileFormatError(f"{self.path} is not the folder of a run: it has no config.json.")
        settings = read_json_object(self.path / "config.json")
        wanted = {"run_id": str, "model": dict, "training": dict}
        if settings.get("format") != _FORMAT or any(not isinstance(settings.get(n), t) for n, t in wanted.items()):
            raise FileFormatError(f"{self.path / 'config.json'} is not that of a run folder of format {_FORMAT}.")
        return settings

    def env_spaces(self) -> dict[str, Any] | None:
        """Spaces of the run's environment, as ``EnvSpaces.from_json`` takes them; None without an environment.

        Those of a run of an earlier version, whose file does not have them, are read off its environment, made again.
        """
        settings = self.settings()
        if settings.get("env") is None:
            return None
        found = settings.get("spaces")
        if isinstance(found, Mapping):
            return dict(found)
        with self.make_env(num_envs=1, parallel="sync") as env:
            return EnvSpaces.underneath(env).to_json()

    def title(self) -> str:
        """What the run is, in a few words."""
        settings = self.settings()
        env = settings.get("env") or {}
        where = env.get("spec") or env.get("made_of") or "recorded episodes"
        return f"{settings['model'].get('model_type')} on {where}"

    def training_config(self, **changes: Any) -> TrainingConfig:
        """The run's ``TrainingConfig``, with ``changes``."""
        return TrainingConfig(**{**self.settings()["training"], **changes})

    def make_env(self, **changes: Any) -> VectorEnv:
        """The run's environments, made again with ``changes`` to the arguments of ``make_env``.

        Raises ``ConfigError`` if they were made of a function or an object, which a file cannot hold.
        """
        settings = self.settings().get("env")
        if settings is None:
            raise ConfigError(f"{self.path} was trained from recorded episodes: it has no environment.")
        spec = changes.pop("spec", settings["spec"])
        if spec is None:
            raise ConfigError(
                f"The environment of {self.path} was made of {settings['made_of']}, which cannot be made again from a "
                "file; register it with Gymnasium and train by its id, or evaluate it in Python by worldloom.training."
                "evaluation.play."
            )
        rest = {name: value for name, value in settings.items() if name not in ("spec", "made_of")}
        return make_env(spec, **{**rest, **changes})

    def callbacks(self, source: Any = None, *, episodes: int = 10, progress: bool = True) -> list[Callback]:
        """Callbacks that write all of it, for one trainer.

        Args:
          source: the environments that are trained in (evaluation and pictures use others of their kind), or a
            ``ReplayBuffer`` of held-out episodes, or None for neither.
          episodes: how many an evaluation plays.
          progress: show a progress bar, and a line per evaluation.

        An environment that draws nothing gives no video, one that cannot be made again no evaluation; a warning says
        so.
        """
        showing: list[Callback] = [ProgressCallback("training"), EvalPrinter()] if progress else []
        online = isinstance(source, VectorEnv)
        evaluation = self._evaluation(source, episodes) if online else None
        measuring: list[Callback] = [evaluation] if evaluation else []
        if evaluation:
            showing.append(FinalEvaluation(evaluation))
        elif source is not None and not online:
            measuring = [EvalCallback(source)]
        monitor = "eval/return" if evaluation else "eval/loss" if measuring else "loss"
        return [
            _Record(self, source if online else None),
            *measuring,
            LoggingCallback(str(self.path), log_to_console=False, log_to_tensorboard=True),
            *showing,
            CheckpointCallback(str(self.checkpoints), monitor=monitor),
            CurveCallback(self.path, self.title, None if online else source),
        ]

    def _evaluation(self, env: VectorEnv, episodes: int) -> EvalReportCallback | None:
        count, seed = min(episodes, _MOST_ENVS), env.seed + 1
        try:
            try:
                other = env.another(count, seed, render=True)
            except ConfigError:
                raise
            except Exception as error:  # Whatever a simulator without graphics raises.
                _log.warning("There will be no video: %s", error)
                other = env.another(count, seed)
        except ConfigError as error:
            _log.warning("There will be no evaluation: %s", error)
            return None
        return EvalReportCallback(other, self.path, self.title, episodes=episodes, seed=seed)


class _Record(Callback):
    """Writes what the run is, before anything else is written, and its weights at the end."""

    every = 0
    order = -2

    def __init__(self, run: RunFolder, env: VectorEnv | None):
        self.run, self.env = run, None if env is None else _plain(env.settings)
        self.spaces = None if env is None else EnvSpaces.underneath(env).to_json()

    def on_train_begin(self, info: StepInfo) -> CallbackResult:
        path = self.run.path
        if self.run.exists and self.run.settings()["run_id"] != info.run_id and any(self.run.checkpoints.glob("*")):
            raise CheckpointError(
                f"{path} holds another run. Go on with that one by train(…, resume='auto'), or choose another folder."
            )
        path.mkdir(parents=True, exist_ok=True)
        cls = info.model_class
        settings = {
            "format": _FORMAT,
            "run_id": info.run_id,
            "model_class": f"{cls.__module__}:{cls.__qualname__}",
            "model": info.model_config.to_dict(),
            "training": info.config.to_dict(),
            "env": self.env,
            "spaces": self.spaces,
        }
        _write_json(path / "config.json", settings)
        starts = _starts(path / "versions.json") if info.step else []
        _write_json(path / "versions.json", [*starts, _this_start(info)])
        return None

    def on_train_end(self, info: StepInfo) -> CallbackResult:
        model = info.model()
        model.remember_env_spaces(self.spaces)
        model.save_pretrained(self.run.path / "model")
        return None


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of environments as JSON takes them; what cannot be made again from a file is described instead."""
    spec = settings.get("spec")
    options = {name: value for name, value in settings.items() if name != "spec" and value is not None}
    try:
        plain = json.loads(json.dumps(options))
    except (TypeError, ValueError):
        return {"spec": None, "made_of": f"{spec!r} with {options!r}"}
    if isinstance(spec, str):
        return {"spec": spec, **plain}
    name = getattr(spec, "__qualname__", None)
    return {"spec": None, "made_of": f"{spec.__module__}.{name}" if name else type(spec).__name__, **plain}


def _this_start(info: StepInfo) -> dict[str, Any]:
    device = next(iter(jax.tree.leaves(jax.config.jax_default_device)), None) or jax.devices()[0]  # type: ignore[attr-defined]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": info.step,
        "command": sys.argv,
        "device": f"{device.device_kind} ({device.platform})",
        "system": platform.platform(),
        "git": _git_revision(Path.cwd()),
        "seed": info.config.seed,
        "packages": versions() | _simulators(),
    }


def _simulators() -> dict[str, str]:
    found = {}
    for name in _SIMULATORS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git_revision(folder: Path) -> str | None:
    """Commit of the checkout around ``folder``, with ``+changes`` if its files differ from that; None without one."""
    try:
        ask = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
        return ask("rev-parse", "HEAD") + ("+changes" if ask("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _starts(path: Path) -> list[Any]:
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return starts if isinstance(starts, list) else []


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
