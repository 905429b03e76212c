"""One table of families and presets, and the one way to a model by name, folder or preset."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from worldloom.config import nearest, read_json_object
from worldloom.errors import ConfigError, FileFormatError, MissingDependencyError, UnknownModelError, WeightsError
from worldloom.models.base import WorldModel, abstract_params, check_fit, flatten, unflatten


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
    model = from_pretrained(text, device=device, **overrides)
    for field, wanted in (("obs_shape", obs_shape), ("action_dim", action_dim)):
        if wanted is not None and model.config != model.config.replace(**{field: wanted}):
            raise ConfigError(f"{text} was saved with {field}={getattr(model.config, field)}, not {wanted}.")
    return model


def config_from_dict(values: Mapping[str, Any]) -> Any:
    """The config of either family from a plain dict, chosen by its ``model_type``."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in ALIASES:
        raise ConfigError(f"model_type={kind!r} is not known; use one of {', '.join(FAMILIES)}.")
    return FAMILIES[ALIASES[kind]].config_class().from_dict(values)


def from_pretrained(
    path_or_repo: str | Path,
    *,
    device: str = "auto",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    **overrides: Any,
) -> WorldModel:
    """Load a saved model from a folder, from the cache by name, or from a Hugging Face repository.

    Args:
      path_or_repo: a folder written by ``save_pretrained``, a name saved with ``save_pretrained(name=…)``, or
        ``"owner/repository"`` (extra ``hub``). They are tried in this order.
      device: where the weights are put.
      revision: branch, tag or commit of the repository.
      cache_dir: folder of downloaded repositories instead of ``WORLDLOOM_CACHE_DIR``.
      token: access token of the hub.
      local_files_only: never ask the network.
      **overrides: config fields to change; those that alter shapes do not fit the weights.

    Raises:
      UnknownModelError: nothing is found under that name.
      FileFormatError: a file is damaged.
      WeightsError: the arrays do not fit the config.
    """
    text = str(path_or_repo)
    if Path(text).is_dir():
        return _load_folder(Path(text), device, overrides)
    if _is_plain_name(text):
        if _is_model_folder(named_folder(text)):
            return _load_folder(named_folder(text), device, overrides)
        raise UnknownModelError(_unknown(text))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise UnknownModelError(f"{text} is not a folder with a saved model, nor the name of one.")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UnknownModelError(
            f"There is no folder {text}. To load it as a Hugging Face repository: pip install 'worldloom[hub]'."
        )
    folder = hub().snapshot_download(
        text,
        revision=revision,
        cache_dir=str(cache_dir or _default_hub_cache()),
        token=token,
        local_files_only=local_files_only,
        allow_patterns=["config.json", "model.safetensors"],
    )
    return _load_folder(Path(folder), device, overrides)


def named_folder(name: str) -> Path:
    """Folder of the model saved as ``name`` in the cache. Raises ``ConfigError`` unless it is a plain name."""
    if not _is_plain_name(name):
        raise ConfigError(f"name={name!r} must be a plain name of letters, digits, '.', '_' and '-'.")
    return cache_dir() / "models" / name


def hub() -> Any:
    """The ``huggingface_hub`` package, or ``MissingDependencyError`` naming the extra."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError("Hugging Face repositories need: pip install 'worldloom[hub]'.") from error
    return huggingface_hub


def _load_folder(folder: Path, device: str, overrides: Mapping[str, Any]) -> WorldModel:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UnknownModelError(f"{folder} holds no saved model: {name} is missing.{_of_run(folder)}")
    config = config_from_dict(read_json_object(folder / "config.json")).replace(**overrides)
    arrays = read_safetensors(folder / "model.safetensors")
    cls = FAMILIES[config.model_type].model_class()
    # A config may ask for any size; before memory is taken for it, the file must be seen to have it.
    _check_parts(config, len(arrays))
    check_fit(cls, flatten(abstract_params(cls, config)), arrays)
    model = cls(config, device=device)
    model.load_params(unflatten(arrays))
    return model


def _of_run(folder: Path) -> str:
    """Where the weights are if ``folder`` is that of a run."""
    if _is_model_folder(folder / "model"):
        return f" It is the folder of a run; the weights at its end are in {folder / 'model'}."
    if (folder / "checkpoints").is_dir():
        return (
            " It is the folder of a run that has not ended; worldloom.training.checkpoint.load_weights(model, "
            f"'{folder / 'checkpoints'}') reads its newest checkpoint."
        )
    return ""


def _check_parts(config: Any, arrays: int) -> None:
    """Raise ``WeightsError`` if the config has more layers or inputs than there are arrays; each has one or more."""
    for name, value in config.to_dict().items():
        parts = len(value) if isinstance(value, dict) else value if name.endswith("layers") else 0
        if parts > arrays:
            raise WeightsError(f"The config has {name} of {parts}, the weights beside it only {arrays} arrays in all.")


def read_safetensors(path: Path) -> dict[str, Any]:
    """Arrays of a ``.safetensors`` file by name. Raises ``FileFormatError`` on a damaged file."""
    from safetensors import SafetensorError
    from safetensors.flax import load_file

    try:
        with jax.default_device(jax.devices("cpu")[0]):
            return load_file(str(path))
    except (SafetensorError, ValueError, OSError) as error:
        raise FileFormatError(f"{path} is not a readable safetensors file: {error}") from error


def _default_hub_cache() -> Path:
    return cache_dir() / "hub"


def _is_plain_name(text: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*", text) is not None


def _is_model_folder(path: Path) -> bool:
    return (path / "config.json").is_file()


def _unknown(name: str) -> str:
    known = list_models()
    return f"There is no model '{name}'.{nearest(name, known)} Known: {', '.join(known)}; or give a folder."
