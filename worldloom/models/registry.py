"""Creates and loads models of any family by preset, name or folder."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from worldloom.errors import ConfigError, UnknownModelError, WorldloomError
from worldloom.families import Family, family_names, find_family, get_family
from worldloom.families import register_family as register_family
from worldloom.files import absolute_path
from worldloom.models import pretrained
from worldloom.models.base import WorldModel, build_saved, find_class
from worldloom.models.compilation import trained_parameters
from worldloom.models.fine_tuning import take_weights

_log = logging.getLogger("worldloom")


def list_models(verbose: bool = False) -> Any:
    """Names that :func:`create_world_model` accepts, a list: presets as ``family:size``, then models saved by name.

    A family without presets is listed by its name alone.

    Args:
      verbose: return a dict instead, from each name to its :func:`get_model_info`; a warning names what it leaves
        out because its files are damaged.
    """
    names = []
    for name in family_names():
        sizes = get_family(name).config_class.presets()
        names += [f"{name}:{size}" for size in sizes] or [name]
    names += pretrained.saved_names()
    if not verbose:
        return names
    found = {}
    for name in names:
        try:
            found[name] = get_model_info(name)
        except WorldloomError as error:
            _log.warning("%s is left out: %s", name, error)
    return found


def get_model_info(name: str) -> dict[str, Any]:
    """What is known of a preset or saved model without building it.

    Returns:
      ``name``, ``family``, ``size`` (empty for a bare family and a saved model), ``about`` (one sentence),
      ``parameters`` (trainable scalars), the ``obs_shape`` and ``action_dim`` that they are counted for, and ``path``:
      the folder of a saved model, None for a preset.

    Raises:
      UnknownModelError: there is no model of that name; the message names the closest one.
      FileFormatError: the files of the saved model are damaged.
    """
    path = None
    if find_family(name.partition(":")[0]):
        family, size = split_name(name)
        cls, config = family.model_class, get_config(name, **family.config_class.example_shapes)
        parameters = family.config_class.preset_parameters.get(size) or trained_parameters(cls, config)
    else:
        path = pretrained.find_model_folder(name, known=list_models(), local_files_only=True)
        config = config_from_dict(pretrained.read_config(path))
        family, size = get_family(config.model_type), ""
        cls = family.model_class
        parameters = pretrained.count_saved(path, cls.untrained)
    return {
        "name": name,
        "family": family.name,
        "size": size,
        "about": (inspect.getdoc(cls) or "").partition("\n")[0].partition(":")[0].rstrip("."),
        "parameters": parameters,
        "obs_shape": config.obs_shape,
        "action_dim": config.action_dim,
        "path": None if path is None else str(path),
    }


def split_name(name: str) -> tuple[Family, str]:
    """Family and size of a preset's name such as ``"tdmpc2:5m"``; the size is empty for a bare family name.

    Raises ``UnknownModelError`` if there is no such preset.
    """
    family_name, _, size = name.partition(":")
    family = find_family(family_name)
    if family is None or (size and size not in family.config_class.presets()):
        raise UnknownModelError(pretrained.unknown_model(name, list_models()))
    return family, size


def get_config(name: str, *, obs_shape: Any, action_dim: Any, **overrides: Any) -> Any:
    """The config of a preset such as ``"tdmpc2:5m"``; a bare family name gives the config's defaults."""
    family, size = split_name(name)
    shapes = {"obs_shape": obs_shape, "action_dim": action_dim}
    if not size:
        return family.config_class(**shapes, **overrides)
    return family.config_class.from_size(size, **shapes, **overrides)


def create_world_model(
    name_or_path: str | Path,
    *,
    obs_shape: Any = None,
    action_dim: Any = None,
    device: str = "auto",
    seed: int = 0,
    init_from: str | Path | WorldModel | None = None,
    task_like: int | str | None = None,
    reset: Sequence[str] = (),
    **overrides: Any,
) -> WorldModel:
    """A new model from a preset name, or a saved model from a folder or from the cache.

    Args:
      name_or_path: ``"dreamerv3:size12m"``, ``"tdmpc2:5m"``, a folder written by ``save_pretrained``, or the name
        of a model in ``WORLDLOOM_CACHE_DIR``. An existing folder wins over a cached name.
      obs_shape: shape of one observation (or a dict of shapes); required for a preset, checked against a saved model.
      action_dim: width of the action, or number of discrete actions; required and checked in the same way.
      device: see :func:`worldloom.devices.resolve_device`.
      seed: seed of the initial weights of a new model.
      init_from: begin a new model with the weights of another one, as far as they fit: a model, or what
        :func:`from_pretrained` takes, or the folder of a run that has ended. What was taken is logged, and kept as
        ``init_report`` of the model, see :class:`~worldloom.models.fine_tuning.InitReport`.
      task_like: where ``init_from`` is a multitask model: the task whose embedding the new single-task model keeps.
      reset: with ``init_from``: parts that begin anew all the same, such as ``["reward"]``.
      **overrides: further config fields.

    Raises:
      UnknownModelError: there is no model of that name; the message lists the known names.
      ConfigError: a preset without shapes, or a saved model with other shapes; see also ``fine_tuning.take_weights``.
    """
    text = str(name_or_path)
    if find_family(text.partition(":")[0]) and not pretrained.is_model_folder(absolute_path(text)):
        if obs_shape is None or action_dim is None:
            raise ConfigError(
                f"'{text}' is a preset: give the shapes too, for example "
                f"create_world_model('{text}', obs_shape=(3, 64, 64), action_dim=6)."
            )
        config = get_config(text, obs_shape=obs_shape, action_dim=action_dim, **overrides)
        model = get_family(config.model_type).model_class(config, seed=seed, device=device)
        if init_from is not None:
            take_weights(model, load_source(init_from), task_like=task_like, reset=reset)
        elif task_like is not None or reset:
            raise ConfigError("task_like and reset say what is taken from another model; give init_from too.")
        return model
    if init_from is not None or task_like is not None or reset:
        raise ConfigError(f"'{text}' is a saved model; init_from, task_like and reset are for new ones, of a preset.")
    model = from_pretrained(text, device=device, **overrides)
    for field, expected in (("obs_shape", obs_shape), ("action_dim", action_dim)):
        if expected is not None and model.config != model.config.replace(**{field: expected}):
            raise ConfigError(f"{text} was saved with {field}={getattr(model.config, field)}, not {expected}.")
    return model


def load_source(init_from: str | Path | WorldModel) -> WorldModel:
    """The model that a new one begins with; see ``init_from`` of :func:`create_world_model`."""
    if isinstance(init_from, WorldModel):
        return init_from
    ended = absolute_path(init_from) / "model"
    return from_pretrained(ended if pretrained.is_model_folder(ended) else init_from)


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

    A saved subclass of a family's model is loaded as that subclass if its module has been imported; loading a file
    never imports the module that it names.

    Args:
      path_or_repo: a folder written by ``save_pretrained``, a name saved with ``save_pretrained(name=…)``, or
        ``"owner/repository"`` (extra ``hub``). They are tried in this order.
      device: device of the weights, see :func:`worldloom.devices.resolve_device`.
      revision: branch, tag or commit of the repository.
      cache_dir: folder of downloaded repositories instead of ``WORLDLOOM_CACHE_DIR``.
      token: access token of the hub.
      local_files_only: never access the network.
      **overrides: config fields to change, except those that determine the weights' shapes.

    Raises:
      UnknownModelError: there is no folder, saved model or repository of that name.
      FileFormatError: a file is damaged.
      ConfigError: the family is not registered, or the saved class is not defined in this process.
      WeightsError: the arrays do not fit the config.
    """
    folder = pretrained.find_model_folder(
        path_or_repo,
        known=list_models(),
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
    )
    saved = pretrained.read_model(folder)
    cls = saved_class(saved.config, saved.class_name, str(path_or_repo))
    return build_saved(cls, saved, device, overrides)


def saved_class(config: Mapping[str, Any], class_name: str | None, place: str) -> type[Any]:
    """The class of a saved model, by its config and class name; see :func:`worldloom.models.base.find_class`."""
    return find_class(_family_of(config).model_class, class_name, place)


def config_from_dict(values: Mapping[str, Any]) -> Any:
    """The config of the family that ``model_type`` names, from a plain dict."""
    return _family_of(values).config_class.from_dict(values)


def _family_of(config: Mapping[str, Any]) -> Family:
    try:
        return get_family(config.get("model_type"))
    except UnknownModelError as error:
        raise ConfigError(f"model_type={config.get('model_type')!r}: {error}") from None
