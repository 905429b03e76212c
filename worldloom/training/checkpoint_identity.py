"""What a run must have in common with a checkpoint to go on exactly from it: configs, and the class of its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worldloom.errors import ConfigError
from worldloom.families import find_family
from worldloom.training.config import TrainingConfig


def check_config(
    path: Path, kind: str, saved: Any, given: Mapping[str, Any], may_change: frozenset[str] = frozenset()
) -> None:
    """Raise ``ConfigError`` naming the first field outside ``may_change`` in which the saved config differs."""
    for name, (before, now) in differences(kind, saved, given).items():
        if name not in may_change:
            raise ConfigError(
                f"{path} was saved with {kind} config {name}={before!r}; this run has {now!r}. Resume with "
                "the saved value, or go on inexactly by resume='continue' (--resume continue), or begin a new run from "
                "its weights: worldloom.training.checkpoint.load_weights."
            )


def differences(kind: str, saved: Any, given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields of a config, of the ``model`` or of ``training``, that differ: name → (saved, given).

    Fields that the version which saved it did not have count as at their defaults.
    """
    family = find_family(given["model_type"]) if kind == "model" else None
    cls = TrainingConfig if kind == "training" else family.config_class if family else None
    saved = {**(cls.defaults() if cls else {}), **(saved if isinstance(saved, Mapping) else {})}
    return {name: (saved.get(name), value) for name, value in given.items() if saved.get(name) != value}


def check_class(path: Path, saved: Any, given: str) -> None:
    """Raise ``ConfigError`` for a model of another class, whose loss may differ. Early checkpoints name no class.

    Modules are not compared: a class defined in a script is in ``__main__`` there, and in a module when imported.
    """
    if saved is not None and str(saved).rpartition(":")[2] != given.rpartition(":")[2]:
        raise ConfigError(
            f"{path} was saved by a run that trained {saved}; this run trains {given}. Resume with a model of that "
            "class, or begin a new run from its weights: worldloom.training.checkpoint.load_weights."
        )
