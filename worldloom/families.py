"""The table of families: which there are, and how a user's own gets in."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

from worldloom.algorithm import Algorithm
from worldloom.config import BaseConfig, nearest
from worldloom.errors import ConfigError, UnknownModelError

ENTRY_POINTS = "worldloom.families"
"""Group of package entry points; each names a module that calls :func:`register_family` when it is imported."""

# Imported when first asked for: importing worldloom alone imports no family.
_BUILT_IN = {"dreamerv3": "worldloom.models.dreamer", "tdmpc2": "worldloom.models.tdmpc2"}
# What the earlier PyTorch library wrote as model_type.
_ALIASES = {"dreamer": "dreamerv3"}


class Family(NamedTuple):
    """A registered family.

    Attributes:
      name: what ``config.json`` calls ``model_type``, and the part of a model's name before the colon.
      config_class: a :class:`~worldloom.config.BaseConfig` whose ``model_type`` defaults to ``name``.
      model_class: the :class:`~worldloom.WorldModel` that is built from it.
      algorithm: see :class:`~worldloom.algorithm.Algorithm`.
    """

    name: str
    config_class: type[Any]
    model_class: type[Any]
    algorithm: Algorithm


_registered: dict[str, Family] = {}

imported_modules: list[str] = []
"""Modules that :func:`import_family_module` has imported, as they were named."""


def register_family(name: str, config_class: type[Any], model_class: type[Any], algorithm: Algorithm) -> Family:
    """Make a family known by ``name`` to ``create_world_model``, ``Trainer``, the command line and reports.

    Call it where the family is defined, at import. Registering the same class again (a notebook cell run twice)
    replaces it.

    Args:
      name: lower-case letters, digits, ``-`` and ``_``.
      config_class: decorated with ``config_dataclass``; has the fields ``obs_shape``, ``action_dim``, ``action_type``,
        ``precision`` and ``model_type``, the last with ``name`` as its default. ``presets()`` and ``from_size`` are
        optional.
      model_class: names ``config_class`` as its own.
      algorithm: becomes the attribute ``algorithm`` of ``model_class``.

    Raises:
      ConfigError: the parts do not fit together, or the name belongs to another class.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise ConfigError(
            f"The family name {name!r} must be lower-case letters, digits, '-' and '_', as in 'my-model'."
        )
    if not (isinstance(config_class, type) and issubclass(config_class, BaseConfig)):
        raise ConfigError(f"config_class={config_class!r} must be a subclass of worldloom.config.BaseConfig.")
    fields = getattr(config_class, "__dataclass_fields__", {})
    missing = [f for f in ("obs_shape", "action_dim", "action_type", "precision", "model_type") if f not in fields]
    if missing:
        raise ConfigError(f"{config_class.__name__} needs the fields {', '.join(missing)} (and @config_dataclass).")
    if fields["model_type"].default != name:
        raise ConfigError(
            f"{config_class.__name__}.model_type defaults to {fields['model_type'].default!r}; for the family "
            f"'{name}' it must be {name!r}, so that a saved config.json names it."
        )
    if getattr(model_class, "config_class", None) is not config_class:
        raise ConfigError(f"{model_class!r} must be a WorldModel with config_class = {config_class.__name__}.")
    if not isinstance(algorithm, Algorithm):
        raise ConfigError(f"algorithm must be a worldloom.algorithm.Algorithm, not a {type(algorithm).__name__}.")
    before = _registered.get(name)
    if name in _ALIASES or (name in _BUILT_IN and model_class.__module__.partition(".")[0] != "worldloom"):
        raise ConfigError(f"'{name}' is a family of worldloom itself; choose another name.")
    if before is not None and before.model_class.__qualname__ != model_class.__qualname__:
        raise ConfigError(f"The family '{name}' is already {before.model_class.__qualname__}; choose another name.")
    model_class.algorithm = algorithm
    _registered[name] = Family(name, config_class, model_class, algorithm)
    return _registered[name]


def find_family(name: str) -> Family | None:
    """The family called ``name``, or None. Built-in families and entry points are imported on the way."""
    name = _ALIASES.get(name, name)
    if name not in _registered and name in _BUILT_IN:
        importlib.import_module(_BUILT_IN[name])
    if name not in _registered:
        for point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
            point.load()
    return _registered.get(name)


def get_family(name: Any) -> Family:
    """The family called ``name``. Raises ``UnknownModelError`` naming those that are registered."""
    family = find_family(name) if isinstance(name, str) else None
    if family is None:
        known = family_names()
        hint = nearest(name, known) if isinstance(name, str) else ""
        raise UnknownModelError(
            f"There is no family {name!r}.{hint} Registered are {', '.join(known)}; one of your own is registered by "
            "importing its module, on the command line by --family-module MODULE."
        )
    return family


def family_names() -> list[str]:
    """Names of all families: built in, provided by installed packages, registered in this process."""
    points = {point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    own = sorted(({*_registered} | points) - {*_BUILT_IN})
    return [*_BUILT_IN, *own]


def import_family_module(name: str) -> None:
    """Import a module that registers a family or defines a subclass of a registered model.

    Args:
      name: dotted name of a module, installed or in the current folder, or the path of a ``.py`` file.

    Raises ``ConfigError`` if there is none, or if it defines no world model.
    """
    module = _load_file(Path(name).expanduser()) if name.endswith(".py") else _load_module(name)
    has_config = [
        value for value in vars(module).values() if isinstance(value, type) and hasattr(value, "config_class")
    ]
    if not any(getattr(value, "algorithm", None) is not None for value in has_config):
        raise ConfigError(
            f"--family-module {name} defines no world model of a registered family: call "
            "worldloom.register_family(name, config_class, model_class, algorithm) at the end of the module."
        )
    imported_modules.append(name)


def _load_file(path: Path) -> types.ModuleType:
    if not path.is_file():
        raise ConfigError(f"--family-module {path}: there is no such file.")
    if path.stem in sys.modules:
        return sys.modules[path.stem]
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if spec is None or spec.loader is None:
        raise ConfigError(f"--family-module {path} is not a Python file.")
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _load_module(name: str) -> types.ModuleType:
    # python -m has the current folder on its path, a console script does not.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, name.partition(".")[0]):
            raise  # Something that the module itself imports.
        raise ConfigError(f"--family-module {name}: there is no module of that name here or installed.") from None
