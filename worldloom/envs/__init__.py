"""Environments: N of one kind, stepped together, as time steps under the arrival rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worldloom.envs.make import SUITES, is_env, make_env
from worldloom.envs.native import EnvSpaces
from worldloom.envs.time_step import BadStep, EpisodeEnd, Event, TimeStep, WorkerRestart, episode_seed
from worldloom.envs.vector import VectorEnv
from worldloom.lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, _LAZY, __all__)
