"""Whether training respects a user's changes of a model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from worldloom.devices import compute_dtype
from worldloom.errors import ConfigError
from worldloom.models.compilation import abstract_model, graphdef


def check_trainable(model: Any, device: jax.Device) -> None:
    """Raise ``ConfigError`` unless an update, which rebuilds the model from class and config, trains exactly ``model``.

    Refused are parts, attributes or methods changed on the object after it was built, overridden methods that no
    update calls, and an activation dtype other than the config's.
    """
    cls: Any = type(model)
    if not hasattr(cls, "algorithm"):
        raise ConfigError(f"{cls.__name__} belongs to no family yet; call worldloom.register_family for it first.")
    # Overridden methods, relative to the family's own class.
    family: Any = next(base for base in reversed(cls.__mro__) if _update_of(base) is cls.algorithm.make_update)
    hooks = " or ".join(family.loss_hooks)
    ignored: list[str] = []
    for base in reversed(cls.__mro__[: cls.__mro__.index(family)]):
        # A class with a loss of its own decides what the loss calls; one derived from it may again miss that.
        if {*family.loss_hooks} & base.__dict__.keys():
            ignored = []
        else:
            ignored += [name for name in family.views if name in base.__dict__]
    if ignored:
        raise ConfigError(
            f"{cls.__name__} overrides {', '.join(ignored)}, which training never calls: it would train as "
            f"{family.__name__} does. Training takes its loss from {hooks} and its parts from build; override those."
        )
    # The activations' dtype.
    dtype = compute_dtype(model.config.precision, device)
    if model.dtype != dtype:
        raise ConfigError(
            f"The model was built with dtype={model.dtype.name}, but training follows config.precision="
            f"{model.config.precision!r}, which is {dtype.name} on {device.platform}. Set "
            f"precision={model.dtype.name!r} in the config instead."
        )
    # The structure: parts, attributes, static values.
    try:
        rebuilt = graphdef(cls, model.config, dtype)
    except TypeError as error:
        raise ConfigError(
            f"{cls.__name__} cannot be built from its config alone, as training does: {error}. Give other arguments "
            "of __init__ defaults, or add them as fields to its config class."
        ) from error
    if nnx.split(model)[0] != rebuilt:
        raise ConfigError(
            f"This {cls.__name__} was changed after it was built; training rebuilds it from class and config and would "
            f"not see {_difference(model, cls, dtype)}. Define a subclass: override build for its parts, "
            f"{hooks or 'its methods'} for its loss."
        )


def _update_of(cls: type[Any]) -> Any:
    """What makes the updates of a family's class; None for others."""
    algorithm = cls.__dict__.get("algorithm")
    return None if algorithm is None else algorithm.make_update


def _difference(model: Any, cls: type[Any], dtype: jnp.dtype) -> str:
    """Names of the attributes in which ``model`` differs from what its class builds."""
    rebuilt = abstract_model(cls, model.config, dtype)
    # Flax keeps its own attributes under private names.
    names = sorted(name for name in {*vars(model), *vars(rebuilt)} if not name.startswith("_"))
    changed, built = (
        {name: _graph_of(getattr(each, name)) for name in names if hasattr(each, name)} for each in (model, rebuilt)
    )
    return ", ".join(name for name in names if changed.get(name) != built.get(name)) or "the change"


def _graph_of(value: Any) -> Any:
    return nnx.split(value)[0] if isinstance(value, nnx.Module) else value
