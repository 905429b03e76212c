"""Published experiments of TD-MPC2: the settings of nicklashansen/tdmpc2 at e9f5932, suite by suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worldloom.algorithm import Curve, ExperimentProtocol, ScoreRule
from worldloom.config import FrozenMapping
from worldloom.models.published import control_task, read_curve
from worldloom.models.tdmpc2.recipes import PREFILL_RULE, REFERENCE_CONTROL, REFERENCE_GYM, REFERENCE_TRAINING
from worldloom.models.tdmpc2.tasks import task_fields

_CURVES = Path(__file__).with_name("published_curves.json")

_SCORE = ScoreRule("evaluation", None, "mean of 10 evaluation episodes at the end of the budget")
_ONLINE: dict[str, Any] = {
    **REFERENCE_TRAINING,
    # One update per decision step; 50,000 of them are 100,000 environment steps at action repeat 2.
    "train_ratio": 0.0,
    "eval_interval": 50_000,
    "eval_at_start": True,
    "eval_episodes": 10,
}
# Five episodes of 500 decision steps with random actions, and as many updates.
_CONTROL = {**_ONLINE, "prefill": 2_500, "prefill_updates": 2_500, "env_steps": 4_000_000}


def published_curve(name: str, env: str) -> Curve | None:
    """See :class:`worldloom.algorithm.Algorithm`."""
    task = control_task(env)
    if task is None:
        return None
    return read_curve(_CURVES, name, task.replace("ball_in_cup", "cup").replace("_", "-"))


def _multitask(name: str, task_dim: int, data: str) -> ExperimentProtocol:
    tasks = task_fields(name)
    return ExperimentProtocol(
        size="5m",
        envs=(),
        score=ScoreRule("evaluation", None, "mean over tasks and 10 episodes each of return / 10 or successes in %"),
        model_fields=FrozenMapping({"num_tasks": len(tasks["action_dims"]), "task_dim": task_dim}),
        data_fields=FrozenMapping({"episodic": False, **tasks}),
        training=FrozenMapping({**REFERENCE_TRAINING, "batch_size": 1_024}),
        data=data,
    )


PROTOCOLS = FrozenMapping(
    {
        "dmc": ExperimentProtocol(
            size="5m",
            envs=("dmc:*",),
            score=_SCORE,
            env_options=FrozenMapping({"num_envs": 1, "action_repeat": 2}),
            model_fields=FrozenMapping(REFERENCE_CONTROL),
            action_type="continuous",
            training=FrozenMapping(_CONTROL),
            curve="tdmpc2",
        ),
        "dmc-pixels": ExperimentProtocol(
            size="5m",
            envs=("dmc_vision:*",),
            score=_SCORE,
            env_options=FrozenMapping({"num_envs": 1, "action_repeat": 2, "frame_stack": 3}),
            model_fields=FrozenMapping(REFERENCE_CONTROL),
            action_type="continuous",
            training=FrozenMapping({**_CONTROL, "env_steps": 2_000_000}),
        ),
        # Prefill and its updates depend on the length of an episode: the recipe has the rule.
        "gym": ExperimentProtocol(
            size="5m",
            envs=("Walker2d-v5", "HalfCheetah-v5", "BipedalWalker-v3", "LunarLanderContinuous-v3"),
            score=_SCORE,
            env_options=FrozenMapping({"num_envs": 1, "action_repeat": 1}),
            model_fields=FrozenMapping({**REFERENCE_GYM, "episodic": True}),
            training=FrozenMapping({**_ONLINE, "env_steps": 4_000_000}),
            derived=FrozenMapping({"prefill": PREFILL_RULE, "prefill_updates": "as many as prefill"}),
            action_type="continuous",
        ),
        "mt30": _multitask("mt30", 64, "20 GB of .pt files of 30 tasks, episodes of 501 rows"),
        "mt80": _multitask("mt80", 96, "34 GB of .pt files of 80 tasks, episodes of 101 rows"),
    }
)
"""Experiments by name; ``worldloom list protocols`` prints them."""
