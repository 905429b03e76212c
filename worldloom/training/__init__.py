"""Training: config, loop, callbacks, checkpoints, evaluation, run folders. Names are imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worldloom.algorithm import TrainState
    from worldloom.replay import ReplayBuffer
    from worldloom.training.collecting import collect
    from worldloom.training.config import TrainingConfig
    from worldloom.training.evaluation import evaluate, play
    from worldloom.training.many import train_many
    from worldloom.training.protocols import protocol
    from worldloom.training.recipes import recipe
    from worldloom.training.run_folder import RunFolder
    from worldloom.training.trainer import Trainer, train

_LAZY = {
    "ReplayBuffer": "worldloom.replay",
    "RunFolder": "worldloom.training.run_folder",
    "TrainState": "worldloom.algorithm",
    "Trainer": "worldloom.training.trainer",
    "TrainingConfig": "worldloom.training.config",
    "collect": "worldloom.training.collecting",
    "evaluate": "worldloom.training.evaluation",
    "play": "worldloom.training.evaluation",
    "protocol": "worldloom.training.protocols",
    "recipe": "worldloom.training.recipes",
    "train": "worldloom.training.trainer",
    "train_many": "worldloom.training.many",
}

__all__ = [
    "ReplayBuffer",
    "RunFolder",
    "TrainState",
    "Trainer",
    "TrainingConfig",
    "collect",
    "evaluate",
    "play",
    "protocol",
    "recipe",
    "train",
    "train_many",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'worldloom.training' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
