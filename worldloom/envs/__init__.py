"""Environments: N of one kind, stepped together, as time steps under the arrival rule."""

from worldloom.envs.make import SUITES, is_env, make_env
from worldloom.envs.native import EnvSpaces
from worldloom.envs.time_step import EpisodeEnd, Event, TimeStep, WorkerRestart, episode_seed
from worldloom.envs.vector import VectorEnv

__all__ = [
    "SUITES",
    "EnvSpaces",
    "EpisodeEnd",
    "Event",
    "TimeStep",
    "VectorEnv",
    "WorkerRestart",
    "episode_seed",
    "is_env",
    "make_env",
]
