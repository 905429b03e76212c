"""From a folder to an agent."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from worldloom import policy_file
from worldloom.acting.policy import Policy
from worldloom.devices import resolve_device
from worldloom.errors import ConfigError, FileFormatError
from worldloom.files import absolute_path
from worldloom.models.registry import from_pretrained, saved_class

_log = logging.getLogger("worldloom")


def load_policy(
    path: str | Path,
    env: Any = None,
    *,
    checkpoint: str | int | None = None,
    num_envs: int | None = None,
    mode: str = "sample",
    planner: dict[str, Any] | None = None,
    max_ms: float | None = None,
    device: str = "auto",
    seed: int = 0,
    trust: bool = False,
) -> Policy | policy_file.PolicyFile:
    """The agent of a run or of a saved model, which acts in the units of the environment it was trained in.

    Args:
      path: folder of a run (``runs/x``), a folder that ``save_pretrained`` wrote, any other name that
        ``from_pretrained`` takes, or a file that ``worldloom export`` wrote. The policy of a file raises ``ValueError``
        for observations that do not fit.
      env: another environment of the same shapes; None is the one that the model was trained in. If that is not known
        (a model that was trained on recorded episodes), continuous actions are in [−1, 1], and a warning is logged.
      checkpoint: of a run: ``"latest"``, ``"best"`` (by evaluation return), or a number of updates. None is the latest,
        or the weights at the run's end if its checkpoints are not there.
      num_envs: see :class:`Policy`, as for ``mode``, ``planner``, ``max_ms`` and ``seed``.
      device: where the weights are put and actions are computed.
      trust: whether a module that only the folder names may be imported, if that is needed to know the environment's
        spaces (runs of an early version).

    Raises what ``from_pretrained`` and :class:`Policy` raise; ``ConfigError`` if ``checkpoint`` is given for a saved
    model, or for a file what was decided when it was written (``env``, ``planner``, …); ``CheckpointError`` for a run
    without such a checkpoint; ``FileFormatError`` for damaged files.
    """
    file = absolute_path(path)
    if file.is_file():
        decided = {"env": env, "checkpoint": checkpoint, "planner": planner, "max_ms": max_ms}
        for name, value in decided.items():
            if value is not None:
                raise ConfigError(f"{path} is a policy file: {name} was decided when it was exported. Export it again.")
        try:
            return policy_file.load_policy(file, num_envs=num_envs, mode=mode, device=resolve_device(device), seed=seed)
        except policy_file.PolicyFileError as error:
            raise FileFormatError(str(error)) from error
        except ValueError as error:
            raise ConfigError(str(error)) from error
    model = load_model(path, checkpoint, device, trust)
    if env is None and model.env_spaces is None:
        _log.warning(
            "%s does not say which environment it was trained in: continuous actions are in [-1, 1]. Give env= to act "
            "in its units.",
            path,
        )
    return Policy(model, env, num_envs=num_envs, mode=mode, planner=planner, max_ms=max_ms, seed=seed)


def load_model(path: str | Path, checkpoint: str | int | None = None, device: str = "auto", trust: bool = False) -> Any:
    """The model of a run or of a saved model, with what it knows of its environment; arguments and errors as above."""
    folder, name = absolute_path(path), str(path)
    ended, checkpoints = (folder / "model" / "config.json").is_file(), folder / "checkpoints"
    if not ended and not checkpoints.is_dir():
        if checkpoint is not None:
            raise ConfigError(f"checkpoint={checkpoint!r} is for the folder of a run; {name} is a saved model.")
        return from_pretrained(name, device=device)

    # Imported here: training brings Orbax along, which acting with a saved model does not need.
    from worldloom.training.checkpoint import Checkpointer
    from worldloom.training.run_folder import RunFolder

    run = RunFolder(folder)
    # The newest checkpoint, not the model at the end: a run that went on after its end is not at that end any more.
    if checkpoint is None and not Checkpointer(checkpoints).steps():
        model = from_pretrained(folder / "model", device=device)
    else:
        model, _ = load_run_model(run, "latest" if checkpoint is None else checkpoint, device)
    if model.env_spaces is None:
        model.remember_env_spaces(run.env_spaces(trust=trust))
    return model


def load_run_model(run: Any, checkpoint: str | int = "latest", device: str = "auto") -> tuple[Any, int]:
    """The model of a ``RunFolder`` with the weights of a checkpoint, and the number of updates behind them.

    Nothing that the folder names is imported, and sizes are compared before memory is allocated. Raises
    ``ConfigError``, ``FileFormatError``, ``WeightsError`` or ``CheckpointError`` for what does not fit or is not there.
    """
    from worldloom.training.checkpoint import load_model

    settings = run.settings()
    cls = saved_class(settings["model"], settings.get("model_class"), str(run.path))
    config = cls.config_class.from_dict(settings["model"])
    return load_model(cls, config, run.checkpoints, checkpoint, device)
