"""A folder with all files of one run: config, versions, metrics, checkpoints, weights, plots."""

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

from worldloom.algorithm import Curve
from worldloom.config import read_json_object
from worldloom.envs import EnvSpaces, VectorEnv, make_env
from worldloom.envs.make import effective_defaults
from worldloom.errors import CheckpointError, ConfigError, FileFormatError
from worldloom.families import class_name, get_family
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
from worldloom.training.callbacks.episodes import EpisodeLog
from worldloom.training.callbacks.reports import CurveCallback, EndEvaluation, EvalPrinter, EvalReportCallback
from worldloom.training.config import TrainingConfig
from worldloom.training.protocols import Experiment, protocol
from worldloom.training.run_info import versions

_log = logging.getLogger("worldloom")
_FORMAT = 1
"""Version of the layout of ``config.json``."""
_MAX_EVAL_ENVS = 10
"""Maximum number of environments that an evaluation steps together."""
_SIMULATORS = ("gymnasium", "dm-control", "mujoco", "ale-py", "crafter", "shimmy")
"""Packages whose versions are recorded if they are installed."""


class RunFolder:
    """A folder with all files of one run::

        runs/pendulum/
          config.json           model, training and environment: everything needed to repeat the run
          versions.json         a record per start: packages, git revision, device, command
          metrics.jsonl         see LoggingCallback; next to it, TensorBoard's event files
          episodes.jsonl        a line for each training episode, see EpisodeLog
          checkpoints/          see CheckpointCallback
          model/                the final weights, for create_world_model
          learning_curve.png    returns, or losses if there is no environment
          eval.gif              the first episode of the newest evaluation
          open_loop*.png        of models that decode observations: open-loop predictions next to that evaluation
          horizon.png           of others: errors of reward, value and latent in that evaluation by prediction steps
          trust.png             how far imagination can be trusted there, see WorldModel.trust

    Pass its callbacks to a trainer::

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
        """``config.json``: ``run_id``, and dicts ``model``, ``training``, ``env``, ``spaces`` (None without any).

        ``env`` holds the arguments of ``make_env`` that were given, ``env_defaults`` what the others came to.
        ``protocol`` is None, or the ``name`` of the published experiment and what was ``changed`` of it: [its value,
        the run's] by name.

        Raises ``FileFormatError`` if the file is missing, damaged or of another format.
        """
        if not self.exists:
            raise FileFormatError(f"{self.path} is not the folder of a run: it has no config.json.")
        settings = read_json_object(self.path / "config.json")
        required = {"run_id": str, "model": dict, "training": dict}
        if settings.get("format") != _FORMAT or any(not isinstance(settings.get(n), t) for n, t in required.items()):
            raise FileFormatError(f"{self.path / 'config.json'} is not a run's config of format {_FORMAT}.")
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
        """Title of plots: the model's type and the environment."""
        settings = self.settings()
        env = settings.get("env") or {}
        source = env.get("spec") or env.get("made_of") or "recorded episodes"
        return f"{settings['model'].get('model_type')} on {source}"

    def training_config(self, **changes: Any) -> TrainingConfig:
        """The run's ``TrainingConfig``, with ``changes``."""
        return TrainingConfig(**{**self.settings()["training"], **changes})

    def make_env(self, **changes: Any) -> VectorEnv:
        """The run's environments, recreated with ``changes`` to the arguments of ``make_env``.

        Raises ``ConfigError`` if they were made from a function or an object, which a file cannot hold.
        """
        settings = self.settings().get("env")
        if settings is None:
            raise ConfigError(f"{self.path} was trained from recorded episodes: it has no environment.")
        spec = changes.pop("spec", settings["spec"])
        if spec is None:
            raise ConfigError(
                f"The environment of {self.path} was made from {settings['made_of']}, which cannot be recreated from a "
                "file; register it with Gymnasium and train by its id, or evaluate it in Python by worldloom.training."
                "evaluation.play."
            )
        options = {name: value for name, value in settings.items() if name not in ("spec", "made_of")}
        # What the defaults came to is of that environment, and says nothing of another one.
        defaults = self.settings().get("env_defaults") or {} if spec == settings["spec"] else {}
        return make_env(spec, **{**defaults, **options, **changes})

    def experiment(self) -> Experiment | None:
        """The published experiment that the run follows, or None."""
        settings = self.settings() if self.exists else {}
        followed, env = settings.get("protocol"), settings.get("env") or {}
        return protocol(followed["name"], env.get("spec") or "") if followed else None

    def published_curve(self) -> Curve | None:
        """The published curve of the run's protocol in its environment, or None."""
        found = self.experiment()
        if found is None or not found.protocol.curve:
            return None
        family = get_family(found.model.partition(":")[0])
        return family.algorithm.published_curve(found.protocol.curve, found.env)

    def callbacks(
        self,
        source: Any = None,
        *,
        episodes: int | None = None,
        progress: bool = True,
        experiment: Experiment | None = None,
    ) -> list[Callback]:
        """Callbacks that write all files of the run, for one trainer.

        If an environment cannot render, there is no video; if it cannot be recreated, there is no evaluation. Either is
        logged as a warning.

        Args:
          source: the environments to train in (evaluations use separate ones made in the same way), a ``ReplayBuffer``
            of held-out episodes, or None for no evaluation.
          episodes: number of episodes per evaluation; None follows ``TrainingConfig.eval_episodes``.
          progress: whether to show a progress bar and print a line per evaluation.
          experiment: the published experiment that the run follows, see :func:`worldloom.training.protocol`; what
            differs from it is recorded. None is that of the run being resumed.
        """
        output: list[Callback] = [ProgressCallback("training"), EvalPrinter()] if progress else []
        online = isinstance(source, VectorEnv)
        evaluation = self._evaluation(source, episodes) if online else None
        evaluations: list[Callback] = [evaluation] if evaluation else []
        if evaluation:
            output.append(EndEvaluation(evaluation))
        elif source is not None and not online:
            evaluations = [EvalCallback(source)]
        monitor = "eval/return" if evaluation else "eval/loss" if evaluations else "loss"
        return [
            _RunRecorder(self, source if online else None, experiment or self.experiment()),
            *([EpisodeLog(self.path)] if online else []),
            *evaluations,
            LoggingCallback(str(self.path), log_to_console=False, log_to_tensorboard=True),
            *output,
            CheckpointCallback(str(self.checkpoints), monitor=monitor),
            CurveCallback(self.path, self.title, None if online else source, published=self.published_curve),
        ]

    def _evaluation(self, env: VectorEnv, episodes: int | None) -> EvalReportCallback | None:
        """The evaluation in separate environments; without video if they cannot render, None if there are none."""
        count, seed = min(episodes or _MAX_EVAL_ENVS, _MAX_EVAL_ENVS), env.seed + 1
        try:
            try:
                eval_env = env.another(count, seed, render=True)
            except ConfigError:
                raise
            except Exception as error:  # Simulators without graphics raise exceptions of any type.
                _log.warning("There will be no video: %s", error)
                eval_env = env.another(count, seed)
        except ConfigError as error:
            _log.warning("There will be no evaluation: %s", error)
            return None
        return EvalReportCallback(eval_env, self.path, self.title, episodes=episodes, seed=seed)


class _RunRecorder(Callback):
    """Writes the run's config and versions before any other file, and the final weights at the end."""

    every = 0
    order = -2

    def __init__(self, run: RunFolder, env: VectorEnv | None, experiment: Experiment | None):
        self.run, self.env = run, None if env is None else _json_settings(env.settings)
        self.env_defaults = None if env is None else effective_defaults(env)
        self.experiment, self._envs = experiment, env
        self.spaces = None if env is None else EnvSpaces.underneath(env).to_json()

    def on_train_begin(self, info: StepInfo) -> CallbackResult:
        path = self.run.path
        if self.run.exists and self.run.settings()["run_id"] != info.run_id and any(self.run.checkpoints.glob("*")):
            raise CheckpointError(
                f"{path} holds another run. Continue that one by train(…, resume='auto'), or choose another folder."
            )
        path.mkdir(parents=True, exist_ok=True)
        settings = {
            "format": _FORMAT,
            "run_id": info.run_id,
            "model_class": class_name(info.model_class),
            "model": info.model_config.to_dict(),
            "training": info.config.to_dict(),
            "env": self.env,
            "env_defaults": self.env_defaults,
            "protocol": self._protocol(info),
            "spaces": self.spaces,
        }
        _write_json(path / "config.json", settings)
        earlier_starts = _read_starts(path / "versions.json") if info.step else []
        _write_json(path / "versions.json", [*earlier_starts, _start_record(info)])
        return None

    def _protocol(self, info: StepInfo) -> dict[str, Any] | None:
        if self.experiment is None or self._envs is None:
            return None
        changed = self.experiment.changes(info.model_config, info.config, self._envs)
        return {"name": self.experiment.name, "changed": changed}

    def on_train_end(self, info: StepInfo) -> CallbackResult:
        model = info.model()
        model.remember_env_spaces(self.spaces)
        model.save_pretrained(self.run.path / "model")
        return None


def _json_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of environments as JSON values; functions and objects are replaced by a description, ``made_of``."""
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


def _start_record(info: StepInfo) -> dict[str, Any]:
    """The record of one start of the run for ``versions.json``."""
    device = next(iter(jax.tree.leaves(jax.config.jax_default_device)), None) or jax.devices()[0]  # type: ignore[attr-defined]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": info.step,
        "command": sys.argv,
        "device": f"{device.device_kind} ({device.platform})",
        "system": platform.platform(),
        "git": _git_revision(Path.cwd()),
        "seed": info.config.seed,
        "packages": versions() | _simulator_versions(),
    }


def _simulator_versions() -> dict[str, str]:
    installed = {}
    for name in _SIMULATORS:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def _git_revision(folder: Path) -> str | None:
    """Commit of the git checkout around ``folder``, with ``+changes`` if files are modified; None outside one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _read_starts(path: Path) -> list[Any]:
    """The list in ``versions.json``; empty if it cannot be read."""
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return starts if isinstance(starts, list) else []


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
