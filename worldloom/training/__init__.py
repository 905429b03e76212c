"""Training: config, loop, callbacks, checkpoints, evaluation, run folders. Names are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worldloom.lazy import lazy_names

if TYPE_CHECKING:
    from worldloom.algorithm import TrainState
    from worldloom.replay import ReplayBuffer
    from worldloom.training.callbacks import (
        Callback,
        CheckpointCallback,
        EarlyStoppingCallback,
        EpisodesCallback,
        EvalCallback,
        LoggingCallback,
        ProgressCallback,
        StepInfo,
        StopTraining,
    )
    from worldloom.training.collecting import collect
    from worldloom.training.config import TrainingConfig
    from worldloom.training.evaluation import evaluate, play
    from worldloom.training.many import train_many
    from worldloom.training.offline_online import offline_then_online
    from worldloom.training.one_call import train
    from worldloom.training.protocols import protocol
    from worldloom.training.recipes import recipe
    from worldloom.training.run_folder import RunFolder
    from worldloom.training.task_evaluation import evaluate_tasks
    from worldloom.training.trainer import Trainer

_LAZY = {
    "Callback": "worldloom.training.callbacks",
    "CheckpointCallback": "worldloom.training.callbacks",
    "EarlyStoppingCallback": "worldloom.training.callbacks",
    "EpisodesCallback": "worldloom.training.callbacks",
    "EvalCallback": "worldloom.training.callbacks",
    "LoggingCallback": "worldloom.training.callbacks",
    "ProgressCallback": "worldloom.training.callbacks",
    "ReplayBuffer": "worldloom.replay",
    "RunFolder": "worldloom.training.run_folder",
    "StepInfo": "worldloom.training.callbacks",
    "StopTraining": "worldloom.training.callbacks",
    "TrainState": "worldloom.algorithm",
    "Trainer": "worldloom.training.trainer",
    "TrainingConfig": "worldloom.training.config",
    "collect": "worldloom.training.collecting",
    "evaluate": "worldloom.training.evaluation",
    "evaluate_tasks": "worldloom.training.task_evaluation",
    "offline_then_online": "worldloom.training.offline_online",
    "play": "worldloom.training.evaluation",
    "protocol": "worldloom.training.protocols",
    "recipe": "worldloom.training.recipes",
    "train": "worldloom.training.one_call",
    "train_many": "worldloom.training.many",
}

__all__ = [
    "Callback",
    "CheckpointCallback",
    "EarlyStoppingCallback",
    "EpisodesCallback",
    "EvalCallback",
    "LoggingCallback",
    "ProgressCallback",
    "ReplayBuffer",
    "RunFolder",
    "StepInfo",
    "StopTraining",
    "TrainState",
    "Trainer",
    "TrainingConfig",
    "collect",
    "evaluate",
    "evaluate_tasks",
    "offline_then_online",
    "play",
    "protocol",
    "recipe",
    "train",
    "train_many",
]

__getattr__, __dir__ = lazy_names(__name__, _LAZY, __all__)
