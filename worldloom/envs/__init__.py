"""Environments: N of one kind, stepped together, as time steps under the arrival rule."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from worldloom.envs.make import SUITES, is_env, make_env
from worldloom.envs.native import EnvSpaces
from worldloom.envs.time_step import BadStep, EpisodeEnd, Event, TimeStep, WorkerRestart, episode_seed
from worldloom.envs.vector import VectorEnv

if TYPE_CHECKING:
    from worldloom.envs.imagined import ImaginedEnv, ImaginedVectorEnv
    from worldloom.envs.imagined_world import ImaginedWorld

# Imported when first used: worker processes need neither JAX nor models.
_LAZY = {
    "ImaginedEnv": "worldloom.envs.imagined",
    "ImaginedVectorEnv": "worldloom.envs.imagined",
    "ImaginedWorld": "worldloom.envs.imagined_world",
}

__all__ = [
    "SUITES",
    "BadStep",
    "EnvSpaces",
    "EpisodeEnd",
    "Event",
    "ImaginedEnv",
    "ImaginedVectorEnv",
    "ImaginedWorld",
    "TimeStep",
    "VectorEnv",
    "WorkerRestart",
    "episode_seed",
    "is_env",
    "make_env",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'worldloom.envs' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)
