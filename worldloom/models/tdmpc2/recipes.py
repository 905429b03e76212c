"""Settings to start from, by size and environment: the reference's, and what ``tiny`` learns well with on two cores."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from worldloom.algorithm import Recipe, env_shapes, window_prefill
from worldloom.config import is_integer
from worldloom.models.pictures import MIN_SIDE, picture_layout
from worldloom.models.tdmpc2.config import PICTURE_CHANNELS, TDMPC2Config, picture_features
from worldloom.spaces import OBS, named

_log = logging.getLogger("worldloom")

FRAME_STACK = 3
"""Images that the reference stacks, since one shows no velocities."""
REFERENCE_TRAINING: dict[str, Any] = {
    "batch_size": 256,
    "sequence_length": 4,
    "learning_rate": 3e-4,
    "grad_clip": 20.0,
}
"""The reference's settings in every suite."""
REFERENCE_CONTROL: dict[str, Any] = {"discount_max": 0.995, "rho": 0.5}
"""What the reference takes elsewhere, and in DeepMind Control."""
REFERENCE_GYM: dict[str, Any] = {"discount_max": 0.99, "rho": 0.7}
"""What the reference's wrapper of Gymnasium tasks sets."""
_TINY: dict[str, Any] = {
    "batch_size": 64,
    "sequence_length": 4,
    "learning_rate": 1e-3,
    "grad_clip": 20.0,
    "eval_interval": 1_000,
    "save_interval": 2_000,
    "log_interval": 250,
}

# With one update a step, and 1,000 steps of prefill, two of ten agents unlearned Pendulum-v1 for a while.
_TINY_CONTINUOUS: dict[str, Any] = {"eval_interval": 2_000, "save_interval": 4_000, "log_interval": 500}
_TINY_PREFILL_POLICY = "correlated"
"""Of the tiny size where episodes may terminate, at a goal say: actions that change at every step leave a car in its
valley and two links hanging, and the agent learns that nothing can be done (MountainCarContinuous-v0, Acrobot-v1)."""
_TINY_UPDATES = 2
"""Updates of the tiny size for each step in tasks with continuous actions, those of the prefill included."""
# The reference has no discrete actions; these learn CartPole-v1 with the tiny size.
_DISCRETE_MODEL = {
    "entropy_coef": 1e-3,
    "tau": 0.03,
    "value_coef": 1.0,
    "consistency_coef": 4.0,
    "encoder_lr_scale": 1.0,
}
_DISCRETE_TRAINING = {"batch_size": 32, "sequence_length": 8, "learning_rate": 5e-4, "train_ratio": 128.0}

_REFERENCE_LATENT = 512
"""Features of the reference's convolutions, which are the latent of its image models."""

_PREFILL_EPISODES, _LEAST_PREFILL = 5, 1_000
"""The reference begins with five whole episodes of random actions and as many updates; here at least 1,000 steps."""
PREFILL_RULE = f"max({_LEAST_PREFILL}, {_PREFILL_EPISODES} × episode length)"
"""The same in words, for the reference's single environment."""
_TINY_PREFILL = 2_000
"""The tiny size's least prefill in tasks with continuous actions."""

JAX_SUITES = ("jax", "gymnax", "craftax", "brax", "playground", "navix", "jumanji")
"""Prefixes of environments in JAX, whose images ``make_env`` does not stack."""
_ONLY_TIME_LIMITS = ("dmc:", "dmc_vision:")
_ONLY_TIME_LIMIT_IDS = ("Pendulum", "HalfCheetah", "Swimmer", "Reacher", "Pusher")
"""Environments whose episodes never terminate. Spaces do not say so; everywhere else terminations are learned."""


def recipe(size: str, env: Any, given: Mapping[str, Any]) -> Recipe:
    """See :class:`worldloom.algorithm.Algorithm`."""
    training = {"device": "auto", **(_TINY if size == "tiny" else REFERENCE_TRAINING)}
    if env is None:
        return Recipe({}, training, {}).override(given)
    model: dict[str, Any] = env_shapes(env)
    reasons = dict.fromkeys(model, "of the environment")
    if env.action_type == "discrete":
        model |= _DISCRETE_MODEL
        training |= _DISCRETE_TRAINING
        reasons |= dict.fromkeys((*_DISCRETE_MODEL, *_DISCRETE_TRAINING), "discrete actions")
    tiny_continuous = size == "tiny" and env.action_type == "continuous"
    if tiny_continuous:
        training |= _TINY_CONTINUOUS
        sizes = {"horizon": TDMPC2Config.horizon} | training | dict(given)
        batch, length, horizon = (sizes[name] for name in ("batch_size", "sequence_length", "horizon"))
        if all(map(is_integer, (batch, length, horizon))):  # Others are refused where the configs are made.
            training["train_ratio"] = float(_TINY_UPDATES * batch * max(length, horizon + 1))
            reasons["train_ratio"] = "two updates a step"
    endless = never_terminates(env)
    if size == "tiny" and not endless:
        training["prefill_policy"] = _TINY_PREFILL_POLICY
        reasons["prefill_policy"] = "reaches where episodes end"
    model["episodic"] = not endless
    reasons["episodic"] = "only time limits end its episodes" if endless else "its episodes may terminate"
    if reference_latent := _reference_latent(env.obs_shape):
        model["latent_dim"] = reference_latent
        reasons["latent_dim"] = "where the image encoder ends"
    _warn_of_single_images(env)
    if env.episode_length:
        model["episode_length"] = env.episode_length
        reasons["episode_length"] = "of the environment, in decision steps"
    # Recorded data have no specification; the reference's own, mt30 and mt80, have the config's values.
    spec = env.settings.get("spec")
    if spec is not None and not str(spec).startswith(_ONLY_TIME_LIMITS) and size != "tiny":
        model |= REFERENCE_GYM
        reasons |= dict.fromkeys(REFERENCE_GYM, "the reference's for Gymnasium tasks")
    length = given.get("episode_length", env.episode_length) or 0
    # The reference takes five times the longest episode. Random actions may end episodes long before; the tiny size,
    # which has learned such tasks with the least prefill, does without.
    least = _TINY_PREFILL if tiny_continuous else _LEAST_PREFILL
    training["prefill"] = max(least, _PREFILL_EPISODES * length if endless or size != "tiny" else 0)
    reasons["prefill"] = "random actions first"
    reasons |= window_prefill(training, env, given)
    for_each = _TINY_UPDATES if tiny_continuous else 1
    training["prefill_updates"] = for_each * given.get("prefill", training["prefill"])
    reasons["prefill_updates"] = "as many as prefill" if for_each == 1 else "two a step of prefill"
    return Recipe(model, training, reasons).override(given)


def _warn_of_single_images(env: Any) -> None:
    """Say that one image shows no velocities. Recorded data, and environments in JAX, cannot be stacked here."""
    spec = env.settings.get("spec")
    stackable = spec.partition(":")[0] not in JAX_SUITES if isinstance(spec, str) else callable(spec)
    images = any(len(shape) == 3 for shape in named(env.obs_shape, OBS).values())
    if images and stackable and not env.settings.get("frame_stack"):
        _log.warning(
            "TD-MPC2 sees one image at a time, which shows no velocities; the reference stacks %d: "
            "make_env(…, frame_stack=%d).",
            FRAME_STACK,
            FRAME_STACK,
        )


def _reference_latent(obs_shape: Any) -> int | None:
    """The latent of a single image of about 64×64 pixels, for which the encoder is the reference's."""
    shapes = list(named(obs_shape, OBS).values())
    if len(shapes) != 1 or len(shapes[0]) != 3 or min(picture_layout(shapes[0])[:2]) < MIN_SIDE:
        return None
    features = PICTURE_CHANNELS * math.prod(picture_features(shapes[0]))
    return features if features == _REFERENCE_LATENT else None


def never_terminates(env: Any) -> bool:
    """Whether only time limits end the episodes of ``env``, as far as its name says; an unknown one may terminate."""
    spec = env.settings.get("spec")
    if not isinstance(spec, str):
        return False
    plain = spec.rpartition(":")[2]
    return spec.startswith(_ONLY_TIME_LIMITS) or plain.startswith(_ONLY_TIME_LIMIT_IDS)
