"""The files of one checkpoint: arrays through Orbax, everything else as JSON, with checksums.

A checkpoint is a folder ``<folder>/<step>/`` with ``state/`` (Orbax), ``run.json`` and ``manifest.json`` (checksums).
It is written as ``<step>.partial`` and renamed when complete, so a folder named by a bare number is always complete.
``orbax.checkpoint.CheckpointManager`` can read the layout too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from worldloom.algorithm import TrainState
from worldloom.config import read_json_object
from worldloom.errors import ConfigError, FileFormatError
from worldloom.files import write_atomically
from worldloom.training.config import TrainingConfig

FORMAT = 1
"""Version of the checkpoint layout."""
_MAX_JSON = 64 << 20
"""Maximum size in bytes of a JSON file."""
_MAY_CHANGE = frozenset(
    {
        "total_steps",
        "env_steps",
        "log_interval",
        "eval_interval",
        "eval_episodes",
        "eval_at_start",
        "eval_at_end",
        "eval_greedy",
        "save_interval",
        "device",
        "updates_per_call",
        "replay_storage",
    }
)
"""Fields of ``TrainingConfig`` that may change when a run is resumed: none of them affects the results."""
_EXTRA = "around/"
"""Prefix of the names of arrays other than the state's."""
_MAX_EXTRA = 1 << 32
"""Maximum size in bytes of these arrays; the state's arrays must have the shapes of the run that resumes."""


class Snapshot(NamedTuple):
    """Everything that a run needs to continue.

    Attributes:
      state: the state, on the host.
      record: JSON-serializable values of everything else: counters, configs, callbacks.
      arrays: arrays of everything else, by name: pending latents, collector.
      replay: the buffer, if training changes it by collecting or by writing latents back; None if it only reads it.
    """

    state: TrainState
    record: dict[str, Any]
    arrays: Mapping[str, np.ndarray] = types.MappingProxyType({})
    replay: Any = None

    @property
    def step(self) -> int:
        """Updates done."""
        return int(self.record["step"])


def write_checkpoint(target: Path, snapshot: Snapshot, **values: Any) -> None:
    """Write ``snapshot`` atomically as the folder ``target``, with further JSON ``values`` in its record."""
    partial = target.with_name(f"{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        extra = {_EXTRA + name: value for name, value in snapshot.arrays.items()}
        _save_arrays(partial / "state", flatten_state(snapshot.state) | extra)
        # Orbax does not save arrays of size zero; the record holds their shapes and dtypes.
        empty = {k: [value.shape, value.dtype.str] for k, value in snapshot.arrays.items() if not value.size}
        _write_json(partial / "run.json", {**snapshot.record, **values, "empty": empty})
        _write_json(partial / "manifest.json", {"files": dict(_checksums(partial))})
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def delete_checkpoint(target: Path) -> None:
    """Delete a checkpoint. It is renamed first: if the process is killed, no incomplete checkpoint keeps the name."""
    renamed = target.rename(target.with_name(f"{target.name}.partial"))
    shutil.rmtree(renamed, ignore_errors=True)


def read_checkpoint(path: Path, template: TrainState, identity: Mapping[str, Any]) -> Snapshot:
    """Read one checkpoint folder in the structure of ``template``, after verifying its checksums.

    ``identity`` holds the ``config``, ``training`` config and ``model_class`` of the run that resumes.

    Raises:
      FileFormatError: a file is missing or damaged, or the arrays do not fit ``template``.
      ConfigError: it belongs to a run with another config or model class.
    """
    record = read_record(path)
    if record.get("format") != FORMAT:
        raise FileFormatError(f"{path} has checkpoint format {record.get('format')!r}; this version reads {FORMAT}.")
    check_config(path, "model", record.get("config"), identity["config"])
    # Fields that the version which wrote it did not have are at their defaults.
    saved = {**TrainingConfig().to_dict(), **(record.get("training") or {})}
    check_config(path, "training", saved, identity["training"], _MAY_CHANGE)
    _check_class(path, record.get("model_class"), identity["model_class"])
    arrays = _load_arrays(path, _tree(template), extra=True)
    extra = {name.removeprefix(_EXTRA): value for name, value in arrays.items() if name.startswith(_EXTRA)}
    extra |= _empty_arrays(record, path)
    return Snapshot(unflatten_state(arrays, template, path), record, extra)


def read_params(path: Path, model: Any) -> dict[str, Any]:
    """The weights in a checkpoint, nested as ``model.params``. Raises as :func:`read_checkpoint`."""
    check_config(path, "model", read_record(path).get("config"), model.config.to_dict())
    template = {"params": model.params}
    return _fit(_load_arrays(path, template), template, path)["params"]


def read_summary(path: Path) -> dict[str, Any]:
    """The JSON record of a checkpoint without verifying checksums; empty if it cannot be read."""
    try:
        return _read_json(path / "run.json")
    except (FileFormatError, OSError):
        return {}


def read_record(path: Path) -> dict[str, Any]:
    """The JSON record of a checkpoint; ``FileFormatError`` unless all its files match their checksums."""
    try:
        files = _read_json(path / "manifest.json")["files"]
        actual = dict(_checksums(path))
        for name, expected in files.items():
            if actual.get(name) != expected:
                state = "damaged" if name in actual else "missing"
                raise FileFormatError(f"The checkpoint {path} is damaged: {name} is {state}.")
        return _read_json(path / "run.json")
    except FileFormatError:
        raise
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"The checkpoint {path} is damaged: {error!r}.") from error


def flatten_state(state: TrainState) -> dict[str, np.ndarray]:
    """All arrays of a state by name (``params/encoder/…``); the key as its raw data, uint32."""
    return _flatten(_tree(state))


def unflatten_state(arrays: Mapping[str, np.ndarray], template: TrainState, path: Path) -> TrainState:
    """Inverse of :func:`flatten_state`; raises ``FileFormatError`` unless names, shapes and dtypes fit."""
    tree = _fit(arrays, _tree(template), path)
    key = jax.random.wrap_key_data(tree["key"], impl=jax.random.key_impl(template.key))
    return template.replace(step=tree["step"], params=tree["params"], opt_state=tree["opt_state"], key=key)


def _tree(state: TrainState) -> dict[str, Any]:
    key = jax.random.key_data(state.key)
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state, "key": key}


def _flatten(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _fit(arrays: Mapping[str, Any], template: Any, path: Path) -> Any:
    """``arrays`` (or ``ShapeDtypeStruct``) in the structure of ``template``; ``FileFormatError`` if they do not fit."""
    values = []
    for name, leaf in _flatten(template).items():
        value = arrays.get(name, np.zeros(leaf.shape, leaf.dtype) if leaf.size == 0 else None)
        if value is None or value.shape != leaf.shape or value.dtype != leaf.dtype:
            has = "does not hold it" if value is None else f"holds {value.dtype}{list(value.shape)}"
            raise FileFormatError(f"{path} does not fit this run: {name} is {leaf.dtype}{list(leaf.shape)}, it {has}.")
        values.append(value)
    return jax.tree.unflatten(jax.tree.structure(template), values)


def _empty_arrays(record: Mapping[str, Any], path: Path) -> dict[str, np.ndarray]:
    """Arrays of size zero, from the shapes and dtypes in the record; :func:`_save_arrays` does not save them."""
    try:
        specs = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in record.get("empty", {}).items()}
        if any(0 not in shape or dtype.hasobject for shape, dtype in specs.values()):
            raise ValueError("an array is not empty")
        return {name: np.zeros(shape, dtype) for name, (shape, dtype) in specs.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(f"The checkpoint {path} has an invalid list of empty arrays: {error}.") from error


def _save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    import orbax.checkpoint as ocp

    # Orbax refuses arrays of size zero; reading recreates them from the template and the record.
    nonempty = {name: np.asarray(array) for name, array in arrays.items() if array.size}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(nonempty))


def _load_arrays(path: Path, template: Any, *, extra: bool = False) -> dict[str, np.ndarray]:
    """The arrays of ``template`` by name, and with ``extra`` those with the prefix ``_EXTRA``.

    Shapes and sizes are checked against the file's metadata before memory is allocated.
    """
    import orbax.checkpoint as ocp

    folder = (path / "state").absolute()
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            saved = {
                name: jax.ShapeDtypeStruct(entry.shape, entry.dtype)
                for name, entry in checkpointer.metadata(folder).item_metadata.tree.items()
            }
            _fit(saved, template, path)
            extras = {name: value for name, value in saved.items() if extra and name.startswith(_EXTRA)}
            if sum(value.size * value.dtype.itemsize for value in extras.values()) > _MAX_EXTRA:
                raise FileFormatError(f"{path} holds more than {_MAX_EXTRA} bytes in addition to the state.")
            requested = {name: saved[name] for name in _flatten(template) if name in saved} | extras
            options = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in requested}
            return checkpointer.restore(
                folder, args=ocp.args.PyTreeRestore(requested, restore_args=options, partial_restore=True)
            )
    except (FileFormatError, MemoryError):
        raise
    except Exception as error:
        # For an unreadable folder Orbax raises a dozen different exceptions, with no common base class.
        raise FileFormatError(f"The checkpoint arrays {folder} cannot be read: {error}") from error


def _checksums(folder: Path) -> Iterator[tuple[str, list[Any]]]:
    """Name, and [size in bytes, SHA-256], of each file in a checkpoint folder except the manifest."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise FileFormatError(f"{path} is neither a file nor a folder; a checkpoint holds nothing else.")
        if path.is_file() and name != "manifest.json":
            with path.open("rb") as file:
                yield name, [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def check_config(
    path: Path, kind: str, saved: Any, given: Mapping[str, Any], may_change: frozenset[str] = frozenset()
) -> None:
    """Raise ``ConfigError`` naming the first field outside ``may_change`` in which the saved config differs."""
    saved = saved if isinstance(saved, Mapping) else {}
    for name, value in given.items():
        if name not in may_change and saved.get(name) != value:
            raise ConfigError(
                f"{path} was saved with {kind} config {name}={saved.get(name)!r}; this run has {value!r}. Resume with "
                "the saved value, or begin a new run from its weights: worldloom.training.checkpoint.load_weights."
            )


def _check_class(path: Path, saved: Any, given: str) -> None:
    """Raise ``ConfigError`` for a model of another class, whose loss may differ. Early checkpoints name no class.

    Modules are not compared: a class defined in a script is in ``__main__`` there, and in a module when imported.
    """
    if saved is not None and str(saved).rpartition(":")[2] != given.rpartition(":")[2]:
        raise ConfigError(
            f"{path} was saved by a run that trained {saved}; this run trains {given}. Resume with a model of that "
            "class, or begin a new run from its weights: worldloom.training.checkpoint.load_weights."
        )


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, max_bytes=_MAX_JSON)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=1))
