"""Callbacks run on the host at intervals of a run. A plain function of a :class:`StepInfo` is one too."""

from worldloom.training.callbacks.base import Callback, CallbackResult, StepInfo, StopTraining, every
from worldloom.training.callbacks.checkpointing import CheckpointCallback
from worldloom.training.callbacks.early_stopping import EarlyStoppingCallback
from worldloom.training.callbacks.episodes import EpisodesCallback
from worldloom.training.callbacks.evaluation import EvalCallback
from worldloom.training.callbacks.logs import LoggingCallback
from worldloom.training.callbacks.progress import ProgressCallback

__all__ = [
    "Callback",
    "CallbackResult",
    "CheckpointCallback",
    "EarlyStoppingCallback",
    "EpisodesCallback",
    "EvalCallback",
    "LoggingCallback",
    "ProgressCallback",
    "StepInfo",
    "StopTraining",
    "every",
]
