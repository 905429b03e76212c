"""Settings to start from, by size: the reference program's, and what ``tiny`` learns well with on two CPU cores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worldloom.algorithm import Recipe, env_shapes, window_prefill

REFERENCE_KL: dict[str, Any] = {"kl_scale": 1.1, "kl_balance": 1 / 1.1}
"""The reference's weights of the KL terms: dynamics 1.0, representation 0.1."""
REFERENCE_TRAINING: dict[str, Any] = {
    "batch_size": 16,
    "sequence_length": 64,
    "learning_rate": 4e-5,
    "warmup_steps": 1_000,
    "grad_clip": 0.0,
}
"""The reference's settings in every suite."""
_PREFILL = 1_100
"""Of an environment of no known suite."""
_TINY: dict[str, Any] = {
    "batch_size": 16,
    "sequence_length": 32,
    "learning_rate": 1e-3,
    # At a constant rate a policy that has solved CartPole leaves it again, every few hundred updates.
    "lr_schedule": "linear",
    "warmup_steps": 200,
    "grad_clip": 0.0,
    "prefill": 1_000,
    "train_ratio": 128.0,
    "eval_interval": 500,
    "save_interval": 1_000,
    "log_interval": 100,
}
_TINY_MODEL: dict[str, Any] = {"kl_free": 0.1, "slow_critic_rate": 0.1}
"""Few latents carry less than the reference's free nat, and the prior would stop learning from them. In some thousand
updates the value of a long episode does not arrive through a critic that is followed as slowly as the reference's."""

_RATIOS = {
    ("atari", 4): 32.0,
    ("atari100k", 4): 256.0,
    ("crafter", 1): 512.0,
    ("dmc", 1): 1024.0,
    ("dmc_vision", 1): 256.0,
    # The program of the published curves, which repeats actions.
    ("dmc", 2): 512.0,
    ("dmc_vision", 2): 512.0,
}
"""The reference's train ratio by suite and action repeat."""
_RATIO = 512.0
"""Of an environment of no known suite."""


def recipe(size: str, env: Any, given: Mapping[str, Any]) -> Recipe:
    """See :class:`worldloom.algorithm.Algorithm`."""
    tiny = size == "tiny"
    training = {"device": "auto", **(_TINY if tiny else {**REFERENCE_TRAINING, "prefill": _PREFILL})}
    training.setdefault("train_ratio", _RATIO)
    model = REFERENCE_KL | (_TINY_MODEL if tiny else {})
    reasons = dict.fromkeys(REFERENCE_KL, "the reference's weights of the two KL terms")
    if tiny:
        reasons |= {
            "kl_free": "small worlds need less than a nat",
            "slow_critic_rate": "short runs",
            "lr_schedule": "keeps what it has learned",
        }
    if env is None:
        return Recipe(model, training, reasons).override(given)
    shapes = env_shapes(env)
    reasons |= dict.fromkeys(shapes, "of the environment")
    suite = str(env.settings.get("spec")).partition(":")[0]
    if not tiny and (suite, env.action_repeat) in _RATIOS:
        training["train_ratio"] = _RATIOS[suite, env.action_repeat]
        reasons["train_ratio"] = f"published for {suite} at action repeat {env.action_repeat}"
    reasons |= window_prefill(training, env, given)
    return Recipe({**shapes, **model}, training, reasons).override(given)
