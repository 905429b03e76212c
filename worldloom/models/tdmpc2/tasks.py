"""Facts about the tasks of the published multitask sets that neither their data nor their weights hold.

Sources: ``TASK_SET`` in ``common/__init__.py`` and the environments of the reference program, nicklashansen/tdmpc2.
"""

from __future__ import annotations

import re
from typing import Any

from worldloom.algorithm import TaskSpec
from worldloom.config import FrozenMapping, nearest
from worldloom.errors import ConfigError
from worldloom.models.tdmpc2.config import TDMPC2Config

_DMCONTROL_STEPS, _OTHER_STEPS = 500, 100
_MANISKILL = ("lift-cube", "pick-cube", "stack-cube", "pick-ycb", "turn-faucet")
_ACTIONS = {
    "walker": 6, "cheetah": 6, "reacher": 2, "reacher-three": 3, "acrobot": 1, "pendulum": 1, "cartpole": 1, "cup": 2,
    "finger": 2, "fish": 5, "hopper": 4, "mw": 4,
}  # fmt: skip
_IN_DM_CONTROL = [
    "walker-stand", "walker-walk", "walker-run", "cheetah-run", "reacher-easy", "reacher-hard", "acrobot-swingup",
    "pendulum-swingup", "cartpole-balance", "cartpole-balance-sparse", "cartpole-swingup", "cartpole-swingup-sparse",
    "cup-catch", "finger-spin", "finger-turn-easy", "finger-turn-hard", "fish-swim", "hopper-stand", "hopper-hop",
]  # fmt: skip
MT30 = [
    *_IN_DM_CONTROL,
    "walker-walk-backwards", "walker-run-backwards", "cheetah-run-backwards", "cheetah-run-front", "cheetah-run-back",
    "cheetah-jump", "hopper-hop-backwards", "reacher-three-easy", "reacher-three-hard", "cup-spin", "pendulum-spin",
]  # fmt: skip
"""The tasks of mt30 in the order of their numbers."""
_METAWORLD_TASKS = 50


def task_fields(task: str | None) -> dict[str, Any]:
    """Config fields that follow from the name of a task or task set; {} for None.

    Raises ``ConfigError`` if there is no such task set, or the name is none of a task.
    """
    if task is None:
        return {}
    if task in ("mt30", "mt80"):
        names = MT30 + (["mw"] * _METAWORLD_TASKS if task == "mt80" else [])
        return {
            "episode_lengths": tuple(episode_length(name) for name in names),
            "action_dims": tuple(
                _ACTIONS.get(name.rpartition("-")[0]) or _ACTIONS[name.split("-")[0]] for name in names
            ),
        }
    if re.fullmatch(r"mt\d+", task):
        raise ConfigError(
            f"The tasks of '{task}' are not published; give episode_lengths and action_dims, or task='mt30' or 'mt80'."
        )
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", task):
        raise ConfigError(f"task='{task}' is not a task name such as 'walker-run'.{nearest(task, MT30)}")
    return {"episode_length": episode_length(task)}


def episode_length(task: str) -> int:
    """Decision steps of an episode of ``task``."""
    return _OTHER_STEPS if task.split("-")[0] in ("mw", "myo") or task in _MANISKILL else _DMCONTROL_STEPS


def task_number(task: int | str, tasks: int) -> int:
    """The number of a task in a model of ``tasks`` tasks; names are those of mt30, which mt80 begins with.

    Raises ``ConfigError`` if there is no such task.
    """
    if isinstance(task, str) and not task.isdecimal():
        if tasks not in (30, 80) or task not in MT30:
            known = MT30 if tasks in (30, 80) else ()
            raise ConfigError(
                f"A model of {tasks} tasks has no task '{task}'.{nearest(task, known)} "
                f"Give its number, 0 … {tasks - 1}."
            )
        return MT30.index(task)
    number = int(task)
    if isinstance(task, bool) or not 0 <= number < tasks:
        raise ConfigError(f"There is no task {task!r}; the model has the tasks 0 … {tasks - 1}.")
    return number


def task_env(task: str) -> str | None:
    """The environment of a task of mt30, such as ``dmc:walker_run``; None for those that dm_control does not have."""
    if task not in _IN_DM_CONTROL:
        return None
    domain, _, rest = task.partition("-")
    return f"dmc:{'ball_in_cup' if domain == 'cup' else domain}_{rest.replace('-', '_')}"


def tasks_of(config: TDMPC2Config) -> list[TaskSpec]:
    """The tasks of a model of mt30, or those of mt80 that are also in mt30; [] for other models.

    Returns of DMControl's tasks count as score divided by 10, as in the paper.
    """
    for name in ("mt30", "mt80"):
        fields = task_fields(name)
        if (config.num_tasks, config.valid_actions) == (len(fields["action_dims"]), fields["action_dims"]):
            options = FrozenMapping({"action_repeat": 2})
            return [TaskSpec(task, number, task_env(task), options) for number, task in enumerate(MT30)]
    return []
