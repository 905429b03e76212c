"""Recommended settings by model and environment; each family provides its own, see ``Algorithm.recipe``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worldloom.algorithm import Recipe
from worldloom.families import get_family


def recipe(name: str, env: Any, given: Mapping[str, Any] | None = None) -> Recipe:
    """Recommended settings for training the preset ``name`` in ``env``.

        env = make_env("Pendulum-v1")
        model, training, _ = recipe("tdmpc2:tiny", env)
        trainer = Trainer(create_world_model("tdmpc2:tiny", **model), TrainingConfig(**training, env_steps=10_000))

    Args:
      name: ``family:size``; sizes without own settings use the family's, which are the reference program's.
      env: a :class:`~worldloom.envs.VectorEnv`; None gives only the settings that do not depend on one.
      given: fixed fields of either config; recommendations that depend on them are derived from their values.

    Raises:
      UnknownModelError: there is no such family.
    """
    family, _, size = name.partition(":")
    return get_family(family).algorithm.recipe(size, env, dict(given or {}))
