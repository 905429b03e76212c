"""Environments behind one small shape."""

from worldloom.envs.make import SUITES, is_env, make_env
from worldloom.envs.rows import EpisodeEnd, Event, Rows, WorkerRestart, episode_seed
from worldloom.envs.vector import VectorEnv

__all__ = [
    "SUITES",
    "EpisodeEnd",
    "Event",
    "Rows",
    "VectorEnv",
    "WorkerRestart",
    "episode_seed",
    "is_env",
    "make_env",
]
