"""Published experiments of DreamerV3: the settings of its program, suite by suite.

From ``dreamerv3/configs.yaml`` of danijar/dreamerv3 at e3f0224; names with ``@2024`` are those of commit 2411f7d, the
program that wrote the published score files. A decision there is an action of any of the environments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worldloom.algorithm import Curve, ExperimentProtocol, ScoreRule
from worldloom.config import FrozenMapping
from worldloom.models.dreamer.recipes import REFERENCE_KL, REFERENCE_TRAINING
from worldloom.models.published import control_task, read_curve

_CURVES = Path(__file__).with_name("published_curves.json")

_TRAINING_RETURNS = "mean return of the training episodes (sampling policy)"


def published_curve(name: str, env: str) -> Curve | None:
    """See :class:`worldloom.algorithm.Algorithm`."""
    task = control_task(env)
    return None if task is None else read_curve(_CURVES, name, f"dmc_{task}")


def _protocol(
    size: str,
    env: str,
    *,
    ratio: float,
    envs: int,
    decisions: float,
    repeat: int,
    prefill: int,
    score: ScoreRule | None = None,
    curve: str = "",
    **options: Any,
) -> ExperimentProtocol:
    """Settings of one suite; those that all suites share are in ``recipes``."""
    env_steps = round(decisions * repeat)
    return ExperimentProtocol(
        size=size,
        envs=(env,),
        score=score or ScoreRule("training", None, f"{_TRAINING_RETURNS} that end in the last 5 % of the budget"),
        env_options=FrozenMapping({"num_envs": envs, "action_repeat": repeat, **options}),
        model_fields=FrozenMapping(REFERENCE_KL),
        training=FrozenMapping(
            {
                **REFERENCE_TRAINING,
                "train_ratio": float(ratio),
                "prefill": prefill,
                "replay_capacity": 5_000_000,
                "env_steps": env_steps,
                # The program measures training episodes only; one evaluation remains, at the end.
                "eval_interval": 0,
            }
        ),
        curve=curve,
    )


def _between(first: int, last: int) -> ScoreRule:
    return ScoreRule("training", (first, last), f"{_TRAINING_RETURNS} that end in {first:,}–{last:,} environment steps")


_ACHIEVEMENTS = ScoreRule(
    "achievements", None, "success rates over all training episodes; their geometric mean in % is the score"
)

PROTOCOLS = FrozenMapping(
    {
        # Today's program.
        "atari": _protocol(
            "size200m", "atari:*", ratio=32, envs=16, decisions=5.1e7, repeat=4, prefill=2_048, noops=30
        ),
        "atari100k": _protocol(
            "size200m",
            "atari100k:*",
            ratio=256,
            envs=1,
            decisions=1.1e5,
            repeat=4,
            prefill=1_088,
            score=_between(390_000, 400_000),
        ),
        "crafter": _protocol(
            "size200m",
            "crafter:reward",
            ratio=512,
            envs=1,
            decisions=1.1e6,
            repeat=1,
            prefill=1_088,
            score=_ACHIEVEMENTS,
        ),
        "dmc-proprio": _protocol("size1m", "dmc:*", ratio=1024, envs=16, decisions=1.1e6, repeat=1, prefill=2_048),
        "dmc-vision": _protocol(
            "size200m", "dmc_vision:*", ratio=256, envs=16, decisions=1.1e6, repeat=1, prefill=2_048
        ),
        # The program of the published score files.
        "dmc-proprio@2024": _protocol(
            "size12m",
            "dmc:*",
            ratio=512,
            envs=16,
            decisions=2.5e5,
            repeat=2,
            prefill=2_048,
            score=_between(480_000, 500_000),
            curve="dreamerv3_proprio",
        ),
        "dmc-vision@2024": _protocol(
            "size12m", "dmc_vision:*", ratio=512, envs=16, decisions=5e5, repeat=2, prefill=2_048
        ),
        "atari@2024": _protocol(
            "size200m", "atari:*", ratio=32, envs=16, decisions=5e7, repeat=4, prefill=2_048, noops=0
        ),
        "atari100k@2024": _protocol(
            "size200m",
            "atari100k:*",
            ratio=256,
            envs=1,
            decisions=1e5,
            repeat=4,
            prefill=1_088,
            noops=0,
            all_actions=True,
            score=_between(390_000, 400_000),
        ),
    }
)
"""Experiments by name; ``worldloom list protocols`` prints them."""
