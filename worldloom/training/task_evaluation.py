"""Evaluation of a multitask model, task by task, each in its own environment."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from worldloom.algorithm import TaskSpec
from worldloom.config import check
from worldloom.envs import make_env
from worldloom.errors import ConfigError, MissingDependencyError
from worldloom.training.evaluation import play

_log = logging.getLogger("worldloom")


class TaskResult(NamedTuple):
    """Evaluation episodes of one task.

    Attributes:
      task: the task.
      returns: return of each episode, [E].
      score: mean score, normalised as published; see ``TaskSpec.score``.
    """

    task: TaskSpec
    returns: np.ndarray
    score: float


def evaluate_tasks(
    model: Any, *, tasks: Sequence[int | str] | None = None, episodes: int = 10, seed: int = 0
) -> Iterator[TaskResult]:
    """Evaluate a multitask model in the environment of each of its tasks that is installed.

    The model acts as the single-task model that it is for the task (``model.single_task``), which computes the same.
    Tasks whose environment is missing are left out, with a message.

    Args:
      model: a multitask model whose tasks are known, see ``Algorithm.tasks``.
      tasks: names or numbers; None is all of them.
      episodes: number of episodes of each.
      seed: of environments and policy.

    Yields one result after the other.

    Raises ``ConfigError`` if the tasks of ``model`` are not known, or it has no such task.
    """
    known = model.algorithm.tasks(model.config)
    check(bool(known), "The tasks of this model are not known: those of the published sets mt30 and mt80 are.")
    by_name = {str(key): task for task in known for key in (task.name, task.number)}
    chosen = known if tasks is None else [by_name.get(str(each)) for each in tasks]
    if None in chosen:
        missing = [str(each) for each in tasks or () if str(each) not in by_name]
        raise ConfigError(f"The model has no task {', '.join(missing)}; it has {', '.join(t.name for t in known)}.")
    left_out = [task.name for task in chosen if task is not None and task.env is None]
    if left_out:
        _log.warning("These tasks have no environment here: %s.", ", ".join(left_out))
    for task in chosen:
        if task is not None and task.env is not None:
            result = _evaluate(model, task, episodes, seed)
            if result is not None:
                yield result


def _evaluate(model: Any, task: TaskSpec, episodes: int, seed: int) -> TaskResult | None:
    assert task.env is not None
    try:
        env = make_env(task.env, episodes, seed=seed, **task.env_options)
    except MissingDependencyError as error:
        _log.warning("%s is left out: %s", task.name, error)
        return None
    with env:
        shape: Any = env.obs_shape
        single = model.single_task(task.number, obs_dim=shape[0], action_dim=env.action_dim)
        ends = play(single, env, episodes=episodes, seed=seed)
    returns = np.array([end.episode_return for end in ends])
    return TaskResult(task, returns, float(np.mean([task.score(value) for value in returns])))
