"""Saved models on disk and on the Hugging Face hub: locating, writing and reading them.

A saved model is a folder with ``config.json`` (the config's fields) and ``model.safetensors`` (the weights by flat
name; the model's class is in the header's metadata), and, if the model was trained in an environment, ``spaces.json``
(the environment's spaces).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from worldloom.config import nearest, read_json_object
from worldloom.errors import (
    ConfigError,
    FileFormatError,
    MissingDependencyError,
    UnknownModelError,
    WeightsError,
    WorldloomError,
)
from worldloom.families import class_name
from worldloom.files import absolute_path, fsync_folder, make_folder, write_atomically
from worldloom.models.card import CARD_FILE

CONFIG_FILE, WEIGHTS_FILE, SPACES_FILE = "config.json", "model.safetensors", "spaces.json"
_SPACES_BYTES = 1 << 26
"""The largest ``spaces.json`` that is read: an image whose pixels have bounds of their own takes some megabytes."""
_CLASS = "model_class"
"""Metadata key of the model's class, see :func:`worldloom.families.class_name`."""


class SavedModel(NamedTuple):
    """The contents of a saved model's folder.

    Attributes:
      folder: the folder that was read.
      config: the fields of ``config.json``.
      arrays: weights by flat name.
      class_name: ``module:QualifiedName`` of the saved model's class; None in files of earlier versions.
      spaces: of the environment that the model was trained in, as JSON values; None if they are not known.
    """

    folder: Path
    config: dict[str, Any]
    arrays: dict[str, Any]
    class_name: str | None
    spaces: dict[str, Any] | None = None


def write_model(
    folder: Path,
    config_json: str,
    arrays: Mapping[str, Any],
    cls: type[Any],
    spaces: Mapping[str, Any] | None = None,
) -> None:
    """Write the files of a saved model, each atomically; ``spaces`` None removes those of an earlier model."""
    from safetensors.numpy import save

    make_folder(folder)
    metadata = {"format": "worldloom", _CLASS: class_name(cls)}
    write_atomically(folder / WEIGHTS_FILE, save(dict(arrays), metadata=metadata))
    write_atomically(folder / CONFIG_FILE, config_json)
    if spaces is None:
        (folder / SPACES_FILE).unlink(missing_ok=True)
    else:
        write_atomically(folder / SPACES_FILE, json.dumps(spaces, ensure_ascii=False, allow_nan=False) + "\n")
    fsync_folder(folder)


def read_model(folder: Path) -> SavedModel:
    """Read all files. Raises ``UnknownModelError`` for a folder without them, ``FileFormatError`` for damaged ones."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UnknownModelError(f"{folder} holds no saved model: {name} is missing.{_run_folder_hint(folder)}")
    config = read_json_object(folder / CONFIG_FILE)
    arrays, metadata = read_safetensors(folder / WEIGHTS_FILE)
    found = (folder / SPACES_FILE).is_file()
    spaces = read_json_object(folder / SPACES_FILE, max_bytes=_SPACES_BYTES) if found else None
    return SavedModel(folder, config, arrays, metadata.get(_CLASS), spaces)


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of ``config.json``. Raises ``UnknownModelError`` if it is missing, ``FileFormatError`` if damaged."""
    if not is_model_folder(folder):
        raise UnknownModelError(f"{folder} holds no saved model: {CONFIG_FILE} is missing.{_run_folder_hint(folder)}")
    return read_json_object(folder / CONFIG_FILE)


def count_saved(folder: Path, untrained: Sequence[str]) -> int:
    """Numbers in the saved weights but for the parts ``untrained``; reads no weights. Raises ``FileFormatError``."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(folder / WEIGHTS_FILE), "numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, ValueError, OSError) as error:
        raise FileFormatError(f"{folder / WEIGHTS_FILE} is not a readable safetensors file: {error}") from error
    return sum(math.prod(shape) for name, shape in shapes.items() if name.partition(".")[0] not in untrained)


def read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Arrays of a ``.safetensors`` file by name, and its metadata. Raises ``FileFormatError`` on a damaged file."""
    from safetensors import SafetensorError, safe_open
    from safetensors.flax import load_file

    try:
        with jax.default_device(jax.devices("cpu")[0]):
            arrays = load_file(str(path))
        with safe_open(str(path), "numpy") as file:
            return arrays, dict(file.metadata() or {})
    except (SafetensorError, ValueError, OSError) as error:
        raise FileFormatError(f"{path} is not a readable safetensors file: {error}") from error


def check_part_counts(config: Any, arrays: int) -> None:
    """Raise ``WeightsError`` if the config has more layers or inputs than there are arrays; each has at least one.

    A damaged or hostile config file may name any number, so check before a model of that size is built.
    """
    for name, value in config.to_dict().items():
        parts = len(value) if isinstance(value, dict) else value if name.endswith("layers") else 0
        if parts > arrays:
            raise WeightsError(f"The config has {name} of {parts}, but the weights file only {arrays} arrays in all.")


# ---- locating models --------------------------------------------------------------------------------------------


def find_model_folder(
    path_or_repo: str | Path,
    *,
    known: list[str],
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a saved model, given its path, its name in the cache, or a Hugging Face repository (downloaded).

    Raises ``UnknownModelError`` listing the names in ``known`` if nothing is found.
    """
    text = str(path_or_repo)
    if absolute_path(path_or_repo).is_dir():
        return absolute_path(path_or_repo)
    if is_plain_name(text):
        if is_model_folder(named_folder(text)):
            return named_folder(text)
        raise UnknownModelError(unknown_model(text, known))
    if re.fullmatch(r"[\w-]+:[\w.-]*", text):  # like a preset
        raise UnknownModelError(unknown_model(text, known))
    if not is_repository(text):
        raise UnknownModelError(f"{text} is not a folder with a saved model, nor the name of one.")
    return download(
        text, known=known, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
    )


def is_repository(text: str) -> bool:
    """Whether ``text`` can name a repository of a hub, ``owner/name``."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None


def download(
    repo_id: str,
    *,
    known: list[str],
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a Hugging Face repository in the cache, downloaded unless ``local_files_only``.

    Raises ``UnknownModelError`` if the hub, or with ``local_files_only`` the cache, does not have it.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UnknownModelError(
            f"There is no folder {repo_id}. To load it as a Hugging Face repository: pip install 'worldloom[hub]'."
        )
    with _hub_errors(repo_id, revision, local_files_only):
        downloaded = hub().snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=str(cache_dir or default_cache_dir() / "hub"),
            token=token,
            local_files_only=local_files_only,
            allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, SPACES_FILE, CARD_FILE, "*.png", "*.gif"],
        )
    return Path(downloaded)


def upload(client: Any, repo_id: str, folder: Path, *, token: str | None, private: bool) -> str:
    """Create the repository unless it is there, upload ``folder``, and return the address."""
    with _hub_errors(repo_id, None, False):
        address = client.create_repo(repo_id, token=token, private=private, exist_ok=True)
        client.upload_folder(repo_id=repo_id, folder_path=str(folder), token=token)
    return str(address)


@contextlib.contextmanager
def _hub_errors(repo_id: str, revision: str | None, local: bool) -> Iterator[None]:
    """Turn the exceptions of ``huggingface_hub``, and of its connections, into ``UnknownModelError``."""
    try:
        yield
    except WorldloomError:
        raise
    except Exception as error:
        foreign = type(error).__module__.split(".")[0] in ("huggingface_hub", "requests", "httpx", "urllib3")
        if not foreign and not isinstance(error, OSError):
            raise
        at = f" at revision {revision}" if revision else ""
        if local:
            reason = "it is not among the downloaded files (local_files_only)"
        else:
            reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UnknownModelError(f"The repository {repo_id}{at} cannot be used: {reason}.") from error


def default_cache_dir() -> Path:
    """``WORLDLOOM_CACHE_DIR``, or ``~/.cache/worldloom``."""
    return Path(os.environ.get("WORLDLOOM_CACHE_DIR") or Path.home() / ".cache" / "worldloom")


def named_folder(name: str) -> Path:
    """Folder of the model saved as ``name`` in the cache. Raises ``ConfigError`` unless it is a plain name."""
    if not is_plain_name(name):
        raise ConfigError(f"name={name!r} must be a plain name of letters, digits, '.', '_' and '-'.")
    return default_cache_dir() / "models" / name


def saved_names() -> list[str]:
    """Names of the models saved in the cache."""
    return sorted(path.parent.name for path in (default_cache_dir() / "models").glob(f"*/{CONFIG_FILE}"))


def is_plain_name(text: str) -> bool:
    """Whether ``text`` can name a model in the cache."""
    return re.fullmatch(r"\w[\w.-]*", text) is not None


def is_model_folder(path: Path) -> bool:
    """Whether ``path`` is a folder with a ``config.json``."""
    return (path / CONFIG_FILE).is_file()


def unknown_model(name: str, known: list[str]) -> str:
    """Error message for a name that is neither a preset nor a saved model."""
    return (
        f"There is no model '{name}'.{nearest(name, known)} Known: {', '.join(known)}; or give a folder. Your own "
        "family is known once its module is imported (--family-module)."
    )


def hub() -> Any:
    """The ``huggingface_hub`` package. Raises ``MissingDependencyError`` naming the extra."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError("Hugging Face repositories need: pip install 'worldloom[hub]'.") from error
    return huggingface_hub


def _run_folder_hint(folder: Path) -> str:
    """A sentence naming where the weights are, if ``folder`` is a run folder."""
    if is_model_folder(folder / "model"):
        return f" It is the folder of a run; the weights at its end are in {folder / 'model'}."
    if (folder / "checkpoints").is_dir():
        return (
            " It is the folder of a run that has not ended; worldloom.training.checkpoint.load_weights(model, "
            f"'{folder / 'checkpoints'}') loads its newest checkpoint."
        )
    return ""
