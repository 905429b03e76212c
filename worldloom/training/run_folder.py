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
from worldloom.envs.make import effective_defaults, module_of
from worldloom.errors import CheckpointError, ConfigError, FileFormatError
from worldloom.families import class_name, get_family
from worldloom.files import TEMPORARY, absolute_path, fsync_folder, make_folder, write_atomically
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
from worldloom.training.checkpoint import Checkpointer
from worldloom.training.config import TrainingConfig
from worldloom.training.protocols import Experiment, protocol
from worldloom.training.run_info import versions
from worldloom.training.run_lock import RunLock

_log = logging.getLogger("worldloom")
_FORMAT = 1
"""Version of the layout of ``config.json``."""
_KINDS: dict[str, Any] = {
    "run_id": str,
    "model": dict,
    "training": dict,
    "model_class": str | None,
    "env": dict | None,
    "spaces": dict | None,
    "data": dict | None,
}
"""Its parts; those that may be None are missing in files of earlier versions."""
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

    While a process trains into the folder, the file ``run.lock`` names it, and a second one is refused.

    Args:
      path: the folder; created when training begins. ``~`` is expanded, and a relative path is made absolute here.
    """

    def __init__(self, path: str | Path):
        self.path = absolute_path(path)
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
            members = sorted(each.parent.name for each in self.path.glob("*seed*/config.json"))
            hint = f" It holds the runs {', '.join(members[:8])}{', …' if len(members) > 8 else ''}." if members else ""
            raise FileFormatError(f"{self.path} is not the folder of a run: it has no config.json.{hint}")
        settings = read_json_object(self.path / "config.json")
        if settings.get("format") != _FORMAT:
            raise FileFormatError(f"{self.path / 'config.json'} is not a run's config of format {_FORMAT}.")
        for name, kind in _KINDS.items():
            if not isinstance(settings.get(name), kind):
                raise FileFormatError(f"{self.path / 'config.json'} is damaged: {name} is {settings.get(name)!r:.100}.")
        return settings

    def env_spaces(self, *, trust: bool = False) -> dict[str, Any] | None:
        """Spaces of the run's environment, as ``EnvSpaces.from_json`` takes them; None without an environment.

        Those of a run of an earlier version, whose file does not have them, are read off its environment, made again;
        ``trust`` is that of :meth:`make_env`.
        """
        settings = self.settings()
        if settings.get("env") is None:
            return None
        found = settings.get("spaces")
        if isinstance(found, Mapping):
            return dict(found)
        with self.make_env(trust=trust, num_envs=1, parallel="sync") as env:
            return EnvSpaces.underneath(env).to_json()

    def title(self) -> str:
        """Title of plots: the model's type and the environment."""
        settings = self.settings()
        env = settings.get("env") or {}
        data = settings.get("data")
        recorded = data.get("data") if isinstance(data, Mapping) else None
        source = env.get("spec") or env.get("made_of") or recorded or "recorded episodes"
        return f"{settings['model'].get('model_type')} on {source}"

    def training_config(self, **changes: Any) -> TrainingConfig:
        """The run's ``TrainingConfig``, with ``changes``."""
        return TrainingConfig(**{**self.settings()["training"], **changes})

    def make_env(self, *, trust: bool = False, **changes: Any) -> VectorEnv:
        """The run's environments, recreated with ``changes`` to the arguments of ``make_env``.

        Args:
          trust: whether a module that only the folder names (``"module:Id"``) may be imported, which runs its code. One
            that this process has imported already may be named in any case.
          **changes: arguments of ``make_env``; ``spec`` is another environment.

        Raises ``ConfigError`` if they were made from a function or an object, which a file cannot hold, if a module
        would have to be imported, or if the folder's arguments are none that ``make_env`` takes.
        """
        settings = self.settings().get("env")
        spec = changes.pop("spec", None)
        if settings is None and spec is None:
            raise ConfigError(
                f"{self.path} was trained from recorded episodes: it has no environment. Name one of the same shapes: "
                "--env, in Python spec=."
            )
        if settings is None:
            return make_env(spec, **changes)
        if spec is None:
            spec = self._recorded_spec(settings, trust)
        options = {name: value for name, value in settings.items() if name not in ("spec", "made_of")}
        # What the defaults came to is of that environment, and says nothing of another one.
        defaults = self.settings().get("env_defaults") or {} if spec == settings.get("spec") else {}
        try:
            return make_env(spec, **{**defaults, **options, **changes})
        except TypeError as error:
            raise ConfigError(f"The environment of {self.path} cannot be made with {options}: {error}") from error

    def _recorded_spec(self, settings: Mapping[str, Any], trust: bool) -> str:
        """The id in the run's settings. Raises as :meth:`make_env`."""
        spec = settings.get("spec")
        if not isinstance(spec, str):
            raise ConfigError(
                f"The environment of {self.path} was made from {settings.get('made_of')}, which cannot be recreated "
                "from a file. Name it: by --env on the command line, after registering it with Gymnasium (module:Id), "
                "or by spec= in Python; worldloom.training.play evaluates in environments of your own."
            )
        module = module_of(spec)
        if module and not trust and module not in sys.modules:
            raise ConfigError(
                f"The environment of {self.path} is {spec!r}: making it would import the module '{module}', which only "
                f"this folder names, and run its code. If you trust it, add --trust or --env {spec} (in Python: "
                "trust=True, or import the module first)."
            )
        return spec

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
        data: Mapping[str, Any] | None = None,
        evaluate: bool = True,
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
          data: where recorded episodes are from, as JSON values to record as ``data`` in ``config.json``.
          evaluate: whether there are evaluations; without, no environments are made for them.
        """
        output: list[Callback] = [ProgressCallback("training"), EvalPrinter()] if progress else []
        online = isinstance(source, VectorEnv)
        evaluation = self._evaluation(source, episodes) if online and evaluate else None
        evaluations: list[Callback] = [evaluation] if evaluation else []
        if evaluation:
            output.append(EndEvaluation(evaluation))
        elif source is not None and not online and evaluate:
            evaluations = [EvalCallback(source)]
        monitor = "eval/return" if evaluation else "eval/loss" if evaluations else "loss"
        return [
            _RunRecorder(self, source if online else None, experiment or self.experiment(), data),
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

    def __init__(
        self, run: RunFolder, env: VectorEnv | None, experiment: Experiment | None, data: Mapping[str, Any] | None
    ):
        self.run, self.env = run, None if env is None else _json_settings(env.settings)
        self.env_defaults = None if env is None else effective_defaults(env)
        self.experiment, self._envs, self.data = experiment, env, data and dict(data)
        self.spaces = None if env is None else EnvSpaces.underneath(env).to_json()
        self._lock = RunLock(run.path)

    def recorded_run_id(self) -> str | None:
        """Id of the run whose files are already there; ``resume="auto"`` keeps it where no checkpoint is left."""
        return self.run.settings()["run_id"] if self.run.exists else None

    def on_train_begin(self, info: StepInfo) -> CallbackResult:
        path = self.run.path
        make_folder(path)
        self._lock.acquire()
        same = self.run.exists and self.run.settings()["run_id"] == info.run_id
        if self.run.exists and not same and Checkpointer(self.run.checkpoints).steps():
            raise CheckpointError(
                f"{path} holds another run. Continue that one by train(…, resume='auto'), or choose another folder."
            )
        # What a killed process was writing.
        for folder in (path, path / "model"):
            found = list(folder.iterdir()) if folder.is_dir() else []
            for leftover in [each for each in found if TEMPORARY.fullmatch(each.name)]:
                leftover.unlink(missing_ok=True)
        settings = {
            "format": _FORMAT,
            "run_id": info.run_id,
            "model_class": class_name(info.model_class),
            "model": info.model_config.to_dict(),
            "training": info.config.to_dict(),
            "env": self.env,
            "env_defaults": self.env_defaults,
            "data": self.data,
            "protocol": self._protocol(info),
            "spaces": self.spaces,
        }
        if same and not info.step:
            self._warn_of_changes(settings)
        earlier_starts = _read_starts(path / "versions.json") if same else []
        _write_json(path / "versions.json", [*earlier_starts, _start_record(info)])
        _write_json(path / "config.json", settings)
        fsync_folder(path)
        return None

    def _warn_of_changes(self, settings: Mapping[str, Any]) -> None:
        """Name the settings in which a run that begins again differs from the one that is recorded."""
        recorded = self.run.settings()
        changed = [
            name
            for part in ("model", "training")
            for name, value in settings[part].items()
            if recorded[part].get(name, value) != value
        ]
        if changed:
            _log.warning("It begins again with other settings than before: %s.", ", ".join(changed))

    def _protocol(self, info: StepInfo) -> dict[str, Any] | None:
        if self.experiment is None or self._envs is None:
            return None
        changed = self.experiment.changes(info.model_config, info.config, self._envs)
        return {"name": self.experiment.name, "changed": changed}

    def on_train_end(self, info: StepInfo) -> CallbackResult:
        model = info.model()
        model.remember_env_spaces(self.spaces)
        try:
            model.save_pretrained(self.run.path / "model")
        except OSError as error:
            # The checkpoint that follows matters more, and holds these weights too.
            _log.warning("The final weights were not written to %s: %s.", self.run.path / "model", error)
        return None

    def close(self) -> None:
        self._lock.release()


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
