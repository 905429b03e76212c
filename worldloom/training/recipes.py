"""Recommended settings by model and environment; each family provides its own, see ``Algorithm.recipe``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from worldloom.algorithm import Recipe
from worldloom.config import nearest
from worldloom.envs.make import check_made
from worldloom.errors import UnknownFieldError
from worldloom.families import get_family
from worldloom.training.config import TrainingConfig


def recipe(name: str, env: Any, given: Mapping[str, Any] | None = None) -> Recipe:
    """Recommended settings for training the preset ``name`` in ``env``.

        env = make_env("Pendulum-v1")
        model, training, _ = recipe("tdmpc2:tiny", env)
        trainer = Trainer(create_world_model("tdmpc2:tiny", **model), TrainingConfig(**training, env_steps=10_000))

    Args:
      name: ``family:size``; sizes without own settings use the family's, which are the reference program's.
      env: a :class:`~worldloom.envs.VectorEnv`; None gives only the settings that do not depend on one.
      given: fixed fields of either config, which the result contains; recommendations that depend on them are derived
        from their values.

    Raises:
      ConfigError: ``env`` is not what :func:`~worldloom.envs.make_env` returns.
      UnknownModelError: there is no such family.
      UnknownFieldError: a given field is one of neither config.
    """
    if env is not None:
        check_made(env)
    name, _, size = name.partition(":")
    family = get_family(name)
    fixed = dict(given or {})
    model, training = split_fields(family.config_class, fixed)
    found = family.algorithm.recipe(size, env, fixed)
    reasons = {field: reason for field, reason in found.reasons.items() if field not in fixed}
    return Recipe({**found.model, **model}, {**found.training, **training}, reasons)


def split_fields(config_class: type[Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ``given`` fields of a model's config and those of ``TrainingConfig``.

    Raises ``UnknownFieldError`` naming the nearest field for one that neither config has.
    """
    of_model = {field.name for field in dataclasses.fields(config_class)}
    of_training = {field.name for field in dataclasses.fields(TrainingConfig)}  # type: ignore[arg-type]
    known = of_model | of_training
    for name in given:
        if name not in known:
            raise UnknownFieldError(
                f"Neither {config_class.__name__} nor TrainingConfig has a field '{name}'.{nearest(str(name), known)}"
            )
    return (
        {name: value for name, value in given.items() if name in of_model},
        {name: value for name, value in given.items() if name in of_training},
    )
