"""Settings that online training is known to work with, by family, size and environment. A start, not a law."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# What the reference programs use, and what the tiny presets learn well with on two CPU cores.
_TRAINING: dict[str, dict[str, Any]] = {
    "tdmpc2": {"batch_size": 256, "sequence_length": 4, "learning_rate": 3e-4, "grad_clip": 20.0},
    "tdmpc2:tiny": {
        "batch_size": 64,
        "sequence_length": 4,
        "learning_rate": 1e-3,
        "grad_clip": 20.0,
        "eval_interval": 1_000,
        "save_interval": 2_000,
        "log_interval": 250,
    },
    "dreamerv3": {
        "batch_size": 16,
        "sequence_length": 64,
        "learning_rate": 4e-5,
        "warmup_steps": 1_000,
        "grad_clip": 0.0,
        "prefill": 1_100,
        "train_ratio": 512.0,
    },
    "dreamerv3:tiny": {
        "batch_size": 16,
        "sequence_length": 32,
        "learning_rate": 1e-3,
        "warmup_steps": 200,
        "grad_clip": 0.0,
        "prefill": 1_000,
        "train_ratio": 128.0,
        "eval_interval": 500,
        "save_interval": 1_000,
        "log_interval": 100,
    },
}

# The reference has no discrete actions; these learn CartPole-v1 with the tiny size.
_DISCRETE_MODEL = {
    "entropy_coef": 1e-3,
    "tau": 0.03,
    "value_coef": 1.0,
    "consistency_coef": 4.0,
    "encoder_lr_scale": 1.0,
}
_DISCRETE_TRAINING = {"batch_size": 32, "sequence_length": 8, "learning_rate": 5e-4, "train_ratio": 128.0}

_PREFILL_EPISODES, _LEAST_PREFILL = 5, 1_000
"""TD-MPC2 begins with five (whole) episodes of random actions, at least 1,000 decision steps, and as many updates."""

_ONLY_TIME_LIMITS = ("dmc:", "dmc_vision:")
_ONLY_TIME_LIMIT_IDS = ("Pendulum", "HalfCheetah", "Swimmer", "Reacher", "Pusher")
"""Environments whose episodes never terminate. Spaces do not tell, so TD-MPC2 learns terminations everywhere else."""


class Recipe(NamedTuple):
    """Fields to set in the model's and the training config, and why where that is not the family's usual.

    Attributes:
      model: fields of ``DreamerV3Config`` or ``TDMPC2Config``, the environment's shapes included.
      training: fields of ``TrainingConfig``.
      reasons: field name → half a sentence.
    """

    model: dict[str, Any]
    training: dict[str, Any]
    reasons: dict[str, str]


def recipe(name: str, env: Any, given: Mapping[str, Any] | None = None) -> Recipe:
    """What to train the preset ``name`` with in ``env``.

        env = make_env("Pendulum-v1")
        model, training, _ = recipe("tdmpc2:tiny", env)
        trainer = Trainer(create_world_model("tdmpc2:tiny", **model), TrainingConfig(**training, env_steps=10_000))

    Args:
      name: ``family:size``; sizes without a recipe of their own take the family's, which is the reference program's.
      env: a :class:`~worldloom.envs.VectorEnv`.
      given: fields that are settled already, of either config. They win, and what follows from others follows from
        them.
    """
    given = dict(given or {})
    family = name.partition(":")[0]
    shapes = {"obs_shape": env.obs_shape, "action_dim": env.action_dim, "action_type": env.action_type}
    model: dict[str, Any] = dict(shapes)
    training = usual_training(name)
    reasons = dict.fromkeys(shapes, "of the environment")
    if family == "tdmpc2":
        endless = never_terminates(env)
        if env.action_type == "discrete":
            model |= _DISCRETE_MODEL
            training |= _DISCRETE_TRAINING
            reasons |= dict.fromkeys((*_DISCRETE_MODEL, *_DISCRETE_TRAINING), "discrete actions")
        model["episodic"] = not endless
        reasons["episodic"] = "only time limits end its episodes" if endless else "its episodes may terminate"
        length = given.get("episode_length", env.episode_length)
        if isinstance(env.obs_shape, tuple) and len(env.obs_shape) == 3:
            model["latent_dim"] = 512
            reasons["latent_dim"] = "where the image encoder ends"
        if env.episode_length:
            model["episode_length"] = env.episode_length
            reasons["episode_length"] = "of the environment, in decision steps"
        # Random actions end an episode early where it can be ended.
        training["prefill"] = max(_LEAST_PREFILL, _PREFILL_EPISODES * (length or 0) if endless else 0)
        reasons |= {"prefill": "random actions first", "prefill_updates": "as many as prefill"}
    # A window lies in the rows of one environment, so each of them must have taken that many steps.
    windows = env.num_envs * (given.get("sequence_length", training.get("sequence_length", 0)) + 2)
    if training.get("prefill", windows) < windows:
        training["prefill"] = windows
        reasons["prefill"] = f"a window in each of {env.num_envs} environments"
    if family == "tdmpc2":
        training["prefill_updates"] = given.get("prefill", training["prefill"])
    return Recipe(
        {field: given.get(field, value) for field, value in model.items()},
        {field: given.get(field, value) for field, value in training.items()},
        {field: why for field, why in reasons.items() if field not in given},
    )


def usual_training(name: str) -> dict[str, Any]:
    """Fields of ``TrainingConfig`` for the preset ``name`` that do not depend on the environment."""
    return {"device": "auto", **_TRAINING.get(name, _TRAINING.get(name.partition(":")[0], {}))}


def never_terminates(env: Any) -> bool:
    """Whether only time limits end the episodes of ``env``, as far as its name tells; an unknown one may terminate."""
    spec = env.settings.get("spec")
    if not isinstance(spec, str):
        return False
    plain = spec.rpartition(":")[2]
    return spec.startswith(_ONLY_TIME_LIMITS) or plain.startswith(_ONLY_TIME_LIMIT_IDS)
