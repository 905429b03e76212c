"""Weights as nested dicts of arrays: flattening, counting, and comparing shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

from worldloom.algorithm import Params
from worldloom.errors import WeightsError

_MAX_LISTED = 5
"""Maximum number of problems that an error message lists."""


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict → ``{"encoder.mlp.0.kernel": array}``, sorted by name. List indices (ints) become digits."""
    flat: dict[str, Any] = {}
    for key in sorted(params, key=str):
        value = params[key]
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Inverse of :func:`flatten`; name parts that are digits become ints again."""
    nested: dict[Any, Any] = {}
    for name, value in flat.items():
        *path, last = (int(part) if part.isdigit() else part for part in name.split("."))
        node: Any = nested
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return nested


def count_parameters(params: Mapping[str, Any]) -> int:
    """Number of scalars in a nested dict of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def describe_model(model: Any) -> str:
    """``repr`` of a world model: its shapes and the number of its parameters instead of all weights."""
    config = getattr(model, "config", None)
    if config is None:
        return f"{type(model).__name__}(without a config yet)"
    return (
        f"{type(model).__name__}({config.model_type}: observations {config.obs_shape}, {config.action_dim} "
        f"{config.action_type} actions, {model.num_parameters():,} parameters, {model.dtype})"
    )


def check_shapes(owner: str, expected: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ``WeightsError`` naming the arrays of ``given`` that are missing, unexpected or misshapen.

    Args:
      owner: name of the model class, for the message.
      expected: flat name → array or ``ShapeDtypeStruct`` that the model's config needs; only shapes are compared.
      given: flat name → array or ``ShapeDtypeStruct``.
    """
    problems = [f"{name} is missing" for name in expected if name not in given]
    problems += [f"{name[:100]} is unexpected" for name in given if name not in expected]
    problems += [
        f"{name} has shape {tuple(given[name].shape)}, the config needs {tuple(expected[name].shape)}"
        for name in expected
        if name in given and tuple(given[name].shape) != tuple(expected[name].shape)
    ]
    if problems:
        more = f"; and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        raise WeightsError(f"These weights do not fit {owner}: {'; '.join(problems[:_MAX_LISTED])}{more}.")
