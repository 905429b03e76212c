"""One table of families and presets, and the one way to a model by name, folder or preset."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from worldloom.config import nearest, read_json_object
from worldloom.errors import ConfigError, FileFormatError, UnknownModelError
from worldloom.models.base import WorldModel, unflatten


class Family(NamedTuple):
    """Where a family lives: package, config class name, world model class name."""

    package: str
    config: str
    model: str

    def config_class(self) -> Any:
        """The family's config class (imports the family)."""
        return getattr(importlib.import_module(self.package), self.config)

    def model_class(self) -> type[WorldModel]:
        """The family's world model class (imports the family)."""
        return getattr(importlib.import_module(self.package), self.model)


FAMILIES = {
    "dreamerv3": Family("worldloom.models.dreamer", "DreamerV3Config", "DreamerV3WorldModel"),
    "tdmpc2": Family("worldloom.models.tdmpc2", "TDMPC2Config", "TDMPC2WorldModel"),
}
# What the earlier PyTorch library wrote as model_type.
ALIASES = {"dreamer": "dreamerv3", "dreamerv3": "dreamerv3", "tdmpc2": "tdmpc2"}


def cache_dir() -> Path:
    """Folder of models found by name: ``WORLDLOOM_CACHE_DIR``, or ``~/.cache/worldloom``."""
    return Path(os.environ.get("WORLDLOOM_CACHE_DIR") or Path.home() / ".cache" / "worldloom")


def list_models() -> list[str]:
    """Names that :func:`create_world_model` takes: presets as ``family:size``, then models saved by name."""
    presets = [f"{name}:{size}" for name, family in FAMILIES.items() for size in family.config_class().presets()]
    saved = sorted(p.parent.name for p in (cache_dir() / "models").glob("*/config.json"))
    return presets + saved


def get_config(name: str, *, obs_shape: Any, action_dim: Any, **overrides: Any) -> Any:
    """The config of a preset such as ``"tdmpc2:5m"``; a bare family name takes the config's own defaults."""
    family_name, _, size = name.partition(":")
    family = FAMILIES.get(ALIASES.get(family_name, ""))
    if family is None:
        raise UnknownModelError(_unknown(name))
    config_class = family.config_class()
    if not size:
        return config_class(obs_shape=obs_shape, action_dim=action_dim, **overrides)
    if size not in config_class.presets():
        raise UnknownModelError(_unknown(name))
    return config_class.from_size(size, obs_shape=obs_shape, action_dim=action_dim, **overrides)


def create_world_model(
    name_or_path: str | Path,
    *,
    obs_shape: Any = None,
    action_dim: Any = None,
    device: str = "auto",
    seed: int = 0,
    **overrides: Any,
) -> WorldModel:
    """A new model from a preset name, or a saved one from a folder or from the cache.

    Args:
      name_or_path: ``"dreamerv3:size12m"``, ``"tdmpc2:5m"``, a folder written by ``save_pretrained``, or the name
        of a model in ``WORLDLOOM_CACHE_DIR``. An existing folder wins over a cached name.
      obs_shape: shape of one observation (or a dict of shapes); needed for a preset, checked against a saved model.
      action_dim: width of the action, or number of discrete actions; likewise.
      device: see :func:`worldloom.devices.resolve_device`.
      seed: seed of the initial weights of a new model.
      **overrides: further config fields.

    Raises:
      UnknownModelError: nothing goes by that name; the message lists what does.
      ConfigError: a preset without shapes, or a saved model with other shapes.
    """
    text = str(name_or_path)
    if ALIASES.get(text.partition(":")[0]) and not _is_model_folder(Path(text)):
        if obs_shape is None or action_dim is None:
            raise ConfigError(
                f"'{text}' is a preset: give the shapes too, for example "
                f"create_world_model('{text}', obs_shape=(3, 64, 64), action_dim=6)."
            )
        config = get_config(text, obs_shape=obs_shape, action_dim=action_dim, **overrides)
        return FAMILIES[config.model_type].model_class()(config, seed=seed, device=device)
    if _is_model_folder(Path(text)) or os.sep in text:
        model = load_folder(text, device=device, **overrides)
    elif _is_model_folder(cache_dir() / "models" / text):
        model = load_folder(cache_dir() / "models" / text, device=device, **overrides)
    else:
        raise UnknownModelError(_unknown(text))
    for field, wanted in (("obs_shape", obs_shape), ("action_dim", action_dim)):
        if wanted is not None and model.config != model.config.replace(**{field: wanted}):
            raise ConfigError(f"{text} was saved with {field}={getattr(model.config, field)}, not {wanted}.")
    return model


def config_from_dict(values: Mapping[str, Any]) -> Any:
    """The config of either family from a plain dict, chosen by its ``model_type``."""
    kind = values.get("model_type")
    if kind not in ALIASES:
        raise ConfigError(f"model_type={kind!r} is not known; use one of {', '.join(FAMILIES)}.")
    return FAMILIES[ALIASES[kind]].config_class().from_dict(values)


def load_folder(
    path: str | Path, *, device: str = "auto", expected: type[WorldModel] | None = None, **overrides: Any
) -> WorldModel:
    """Load what ``save_pretrained`` wrote. Raises as :meth:`WorldModel.from_pretrained` says."""
    folder = Path(path)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UnknownModelError(f"{folder} holds no saved model: {name} is missing.")
    config = config_from_dict(read_json_object(folder / "config.json"))
    model_class = FAMILIES[config.model_type].model_class()
    if expected is not None and not issubclass(model_class, expected):
        raise ConfigError(f"{folder} holds a {config.model_type} model; load it with {model_class.__name__}.")
    model = model_class(config.replace(**overrides) if overrides else config, device=device)
    model.load_params(unflatten(read_safetensors(folder / "model.safetensors")))
    return model


def read_safetensors(path: Path) -> dict[str, Any]:
    """Arrays of a ``.safetensors`` file by name. Raises ``FileFormatError`` on a damaged file."""
    from safetensors import SafetensorError
    from safetensors.flax import load_file

    try:
        with jax.default_device(jax.devices("cpu")[0]):
            return load_file(str(path))
    except (SafetensorError, ValueError, OSError) as error:
        raise FileFormatError(f"{path} is not a readable safetensors file: {error}") from error


def _is_model_folder(path: Path) -> bool:
    return (path / "config.json").is_file()


def _unknown(name: str) -> str:
    known = list_models()
    return f"There is no model '{name}'.{nearest(name, known)} Known: {', '.join(known)}; or give a folder."
