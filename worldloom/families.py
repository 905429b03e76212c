"""Registry of model families: the built-in ones, and those that users and packages register."""

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

_BUILT_IN = {"dreamerv3": "worldloom.models.dreamer", "tdmpc2": "worldloom.models.tdmpc2"}
"""Modules of the built-in families, imported on first use: importing worldloom alone imports no family."""
_ALIASES = {"dreamer": "dreamerv3"}
"""Values of ``model_type`` in files of the earlier PyTorch library."""


class Family(NamedTuple):
    """A registered family.

    Attributes:
      name: the value of ``model_type`` in ``config.json``, and the part of a model's name before the colon.
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
"""Modules that :func:`import_family_module` has imported, by the names it was given."""


def class_name(cls: type[Any]) -> str:
    """``module:QualifiedName`` of a class, as weights, checkpoints and run folders record a model's class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def register_family(name: str, config_class: type[Any], model_class: type[Any], algorithm: Algorithm) -> Family:
    """Register a family as ``name`` for ``create_world_model``, ``Trainer``, the command line and reports.

    Call it at import, in the module that defines the family. Registering the same class again (a notebook cell run
    twice) replaces it.

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
    registered = _registered.get(name)
    if name in _ALIASES or (name in _BUILT_IN and model_class.__module__.partition(".")[0] != "worldloom"):
        raise ConfigError(f"'{name}' is a built-in family of worldloom; choose another name.")
    if registered is not None and registered.model_class.__qualname__ != model_class.__qualname__:
        raise ConfigError(
            f"The family '{name}' is already registered by {registered.model_class.__qualname__}; choose another name."
        )
    model_class.algorithm = algorithm
    _registered[name] = Family(name, config_class, model_class, algorithm)
    return _registered[name]


def find_family(name: str) -> Family | None:
    """The family called ``name``, or None; imports its module if it is built in or an entry point."""
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
            f"There is no family {name!r}.{hint} Registered are {', '.join(known)}; to register your own, import its "
            "module, on the command line by --family-module MODULE."
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

    Raises ``ConfigError`` if there is no such module, or if it defines no world model.
    """
    module = _load_file(Path(name).expanduser()) if name.endswith(".py") else _load_module(name)
    model_classes = [
        value for value in vars(module).values() if isinstance(value, type) and hasattr(value, "config_class")
    ]
    if not any(getattr(cls, "algorithm", None) is not None for cls in model_classes):
        raise ConfigError(
            f"--family-module {name} defines no world model of a registered family: call "
            "worldloom.register_family(name, config_class, model_class, algorithm) at the end of the module."
        )
    imported_modules.append(name)


def import_from_current_folder() -> None:
    """Have modules of the current folder found, after installed ones: ``python -m`` does, a console script does not."""
    current_folder = str(Path.cwd())
    if current_folder not in sys.path and "" not in sys.path:
        sys.path.append(current_folder)


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
    import_from_current_folder()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, name.partition(".")[0]):
            raise  # An import inside the module failed.
        raise ConfigError(
            f"--family-module {name}: there is no module of that name in the current folder or installed."
        ) from None
