"""The files of one checkpoint: arrays through Orbax, everything else as JSON, with checksums.

A checkpoint is a folder ``<folder>/<step>/`` with ``state/`` (Orbax), ``run.json`` and ``manifest.json`` (checksums).
It is written as ``<step>.partial``, read back, flushed to disk and renamed, so a folder named by a bare number is
always complete, also after a power failure.
``orbax.checkpoint.CheckpointManager`` can read the layout too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import types
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from worldloom.algorithm import TrainState
from worldloom.config import is_integer, read_json_object
from worldloom.errors import CheckpointError, ConfigError, FileFormatError
from worldloom.families import class_name
from worldloom.files import fsync_folder, fsync_tree, plain_path, write_atomically
from worldloom.training.checkpoint_identity import check_class, check_config
from worldloom.training.optimizer_layout import OptimizerLayout
from worldloom.training.orbax_access import checkpointer, full_disk_errors, orbax_warnings

FORMAT = 1
"""Version of the checkpoint layout."""
NEW_OPTIMIZER = "new_optimizer"
"""Key in the record of a snapshot whose optimizer's state did not fit."""
PARTIAL = ".partial"
"""End of the names of folders that are being written or deleted."""
_MAX_JSON = 64 << 20
"""Maximum size in bytes of a JSON file."""
MAY_CHANGE = frozenset(
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
        "mesh",
        "updates_per_call",
        "replay_storage",
        "loop",
        "max_episode_steps",
    }
)
"""Fields of ``TrainingConfig`` that may change when a run is resumed: none of them affects the results."""
_MAX_GROUP = 10_000
"""Maximum number of updates whose latents are written back together; memory is allocated for them."""
_EXTRA = "around/"
"""Prefix of the names of arrays other than the state's."""
_MAX_EXTRA = 1 << 32
"""Maximum size in bytes of these arrays; the state's arrays must have the shapes of the run that resumes."""


class Snapshot(NamedTuple):
    """Everything that a run needs to continue.

    Attributes:
      state: the state, on the host. Of several processes, weights and optimizer are those of the run, until its next
        update; what was read for a run on a mesh is on that mesh.
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


def write_checkpoint(target: Path, snapshot: Snapshot, **values: Any) -> int:
    """Write ``snapshot`` atomically as the folder ``target``, with further JSON ``values`` in its record.

    Returns the size of its files in bytes. Nothing is at ``target`` until everything has been read back.

    Raises ``CheckpointError`` if it cannot be read back or if Orbax warned of anything, ``OSError`` for a failing disk.
    """
    partial = target.with_name(f"{target.name}{PARTIAL}")
    try:
        remove_tree(partial)
        partial.mkdir()
        arrays = arrays_to_save(snapshot)
        _save_arrays(partial / "state", arrays)
        return complete_checkpoint(partial, target, snapshot, arrays, values)
    except BaseException:
        remove_tree(partial)
        raise


def arrays_to_save(snapshot: Snapshot) -> dict[str, Any]:
    """All arrays of a snapshot that are not empty, by name: NumPy's, and JAX's where other processes hold a part.

    Orbax saves none of size zero; reading recreates them from the template and the record.
    """
    arrays = flatten_state(snapshot.state) | {_EXTRA + name: value for name, value in snapshot.arrays.items()}
    return {name: _on_host(array) for name, array in arrays.items() if array.size}


def complete_checkpoint(
    partial: Path,
    target: Path,
    snapshot: Snapshot,
    arrays: Mapping[str, Any],
    values: Mapping[str, Any],
    known: Mapping[str, Any] = types.MappingProxyType({}),
) -> int:
    """Make the checkpoint ``target`` of ``partial``, which holds ``arrays``; see :func:`write_checkpoint`.

    ``known`` are checksums of files in it that other processes have written, read back and flushed to disk.
    """
    empty = {k: [value.shape, value.dtype.str] for k, value in snapshot.arrays.items() if not value.size}
    _write_json(partial / "run.json", {**snapshot.record, **values, "empty": empty})
    _write_json(partial / "manifest.json", {"files": {**known, **dict(checksums(partial, known))}})
    _check_written(partial, arrays, known)
    fsync_tree(partial)
    if target.exists():
        delete_checkpoint(target, f"{target.name}.replaced{PARTIAL}")
    partial.rename(target)
    fsync_folder(target.parent)
    return sum(size for size, _ in _read_json(target / "manifest.json")["files"].values())


def _check_written(folder: Path, arrays: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise ``CheckpointError`` unless all ``arrays`` and files are in ``folder``, as reading it would find them."""
    on_host = {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    smallest = min(on_host, key=lambda name: on_host[name].nbytes)
    try:
        read_record(folder, known)
        # Not through Orbax, which opens every array to list them, and keeps some memory of each.
        listed = _read_json(folder / "state" / "_METADATA")["tree_metadata"].values()
        missing = arrays.keys() - {entry["key_metadata"][0]["key"] for entry in listed}
        # Reading one array goes through the index of all of them, whose absence no checksum shows.
        with _reading(folder), plain_path(folder) as path:
            found = _restore(path / "state", {smallest: on_host[smallest]})[smallest]
    except (FileFormatError, OSError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"What was written cannot be read back: {error}") from error
    if missing or found.tobytes() != on_host[smallest].tobytes():
        raise CheckpointError(f"What was written cannot be read back: {min(missing or {smallest})} differs.")


def delete_checkpoint(target: Path, renamed: str | None = None) -> None:
    """Delete a checkpoint. It is renamed first: if the process is killed, no incomplete checkpoint keeps the name."""
    remove_tree(target.rename(target.with_name(renamed or f"{target.name}{PARTIAL}")))


def remove_tree(path: Path) -> None:
    """Delete a folder if it is there; of a symbolic link, the link. Files that cannot be deleted are left."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def read_checkpoint(
    path: Path,
    template: TrainState,
    identity: Mapping[str, Any],
    *,
    exact: bool = True,
    share: tuple[int, int] = (0, 1),
) -> Snapshot:
    """Read one checkpoint folder in the structure of ``template``, after verifying its checksums.

    What ``template`` has on a mesh is read onto that mesh, by each process the parts of its devices, wherever it was
    saved.

    Args:
      path: the folder.
      template: a state of the run that resumes.
      identity: its ``config``, ``training`` config and ``model_class``, which must equal the checkpoint's.
      exact: if False, they may differ as long as the weights fit; an optimizer's state that does not fit is left out,
        and that of ``template`` takes its place.
      share: (n, of): verify only the n-th of so many shares of the files; other processes verify the others.

    Raises:
      FileFormatError: a file is missing or damaged, or the arrays do not fit ``template``.
      ConfigError: it belongs to a run with another config or model class, or with weights of other shapes.
    """
    record = read_record(path, share=share)
    if record.get("format") != FORMAT:
        raise FileFormatError(f"{path} has checkpoint format {record.get('format')!r}; this version reads {FORMAT}.")
    _check_record(record, path)
    tree = _tree(template)
    if exact:
        check_config(path, "model", record.get("config"), identity["config"])
        check_config(path, "training", record.get("training"), identity["training"], MAY_CHANGE)
        check_class(path, record.get("model_class"), identity["model_class"])
    else:
        saved = _saved_shapes(path)
        if not _fits(saved, {"params": tree["params"]}, path):
            raise ConfigError(
                f"The weights in {path} have other shapes than the model of this run, so nothing can be taken along; "
                "give the model the config of the run, or begin a new run with init_from, which takes weights that fit."
            )
        saved = OptimizerLayout.between(saved, _flatten(tree)).shapes(saved)
        if not _fits(saved, {"opt_state": tree["opt_state"]}, path):
            record[NEW_OPTIMIZER] = True
            del tree["opt_state"]
    arrays = _load_arrays(path, tree, extra=True)
    extra = {name.removeprefix(_EXTRA): value for name, value in arrays.items() if name.startswith(_EXTRA)}
    extra |= _empty_arrays(record, path)
    if "opt_state" not in tree:
        arrays |= {name: _on_host(x) for name, x in _flatten({"opt_state": template.opt_state}).items()}
    return Snapshot(unflatten_state(arrays, template, path), record, extra)


def read_params(path: Path, model: Any) -> dict[str, Any]:
    """The weights in a checkpoint, nested as ``model.params``. Raises as :func:`read_checkpoint`.

    The checkpoint may be of another class with the same config and weights, such as one with another loss.
    """
    record = read_record(path)
    saved, given = record.get("model_class"), class_name(type(model))
    is_other = saved is not None and str(saved).rpartition(":")[2] != given.rpartition(":")[2]
    template = {"params": model.params}
    try:
        check_config(path, "model", record.get("config"), model.config.to_dict())
        arrays = _load_arrays(path, template)
        return _fit(arrays, template, path)["params"]
    except (ConfigError, FileFormatError) as error:
        if not is_other:
            raise
        raise ConfigError(
            f"{path} holds the weights of a {saved}, which do not fit a {given}. Load them into a model of that class."
        ) from error


def read_saved_params(path: Path, cls: Any, config: Any) -> dict[str, Any]:
    """The weights of the model ``cls`` with ``config`` in a checkpoint, nested as ``model.params``, without a model.

    Raises as :func:`read_checkpoint`; ``WeightsError`` or ``ConfigError`` if the config has other parts or sizes. All
    of this is compared before memory is allocated.
    """
    check_config(path, "model", read_record(path).get("config"), config.to_dict())
    count = sum(name.startswith("params/") for name in _saved_shapes(path))
    template = {"params": cls.abstract_params(config, count)}
    return _fit(_load_arrays(path, template), template, path)["params"]


def read_summary(path: Path) -> dict[str, Any]:
    """The JSON record of a checkpoint without verifying checksums; empty if it cannot be read."""
    try:
        return _read_json(path / "run.json")
    except (FileFormatError, OSError):
        return {}


def read_record(path: Path, known: Collection[str] = frozenset(), *, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """The JSON record of a checkpoint; ``FileFormatError`` unless its files match their checksums.

    Those named in ``known`` are not read, nor are those outside of this ``share``, see :func:`read_checkpoint`.
    """
    try:
        files = _read_json(path / "manifest.json")["files"]
        number, shares = share
        own = set(sorted(files, key=lambda name: files[name][0])[number::shares]).difference(known)
        actual = dict(checksums(path, files.keys() - own))
        for name in own:
            if actual.get(name) != files[name]:
                state = "damaged" if name in actual else "missing"
                raise FileFormatError(f"The checkpoint {path} is damaged: {name} is {state}.")
        return _read_json(path / "run.json")
    except FileFormatError:
        raise
    except (OSError, LookupError, TypeError, AttributeError) as error:
        raise FileFormatError(f"The checkpoint {path} is damaged: {error!r}.") from error


def flatten_state(state: TrainState) -> dict[str, Any]:
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


def _on_host(x: Any) -> Any:
    """``x`` as a NumPy array, unless other processes hold a part of it."""
    return x if isinstance(x, jax.Array) and not x.is_fully_addressable else np.asarray(x)


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


def _check_record(record: Mapping[str, Any], path: Path) -> None:
    """Raise ``FileFormatError`` unless the parts of a record are of the types that restoring them takes."""
    kinds: dict[str, Any] = {"run_id": str, "callbacks": dict, "collector": dict, "replay": dict | None}
    counts = [record.get(name) for name in ("step", "skipped")]
    wrong = [name for name, kind in kinds.items() if name in record and not isinstance(record[name], kind)]
    if wrong or any(not is_integer(count) or not 0 <= int(count or 0) < 2**62 for count in counts):
        raise FileFormatError(f"The checkpoint {path} is damaged: its record has no valid {(wrong or ['step'])[0]}.")
    group = record.get("latent_group")
    if group is not None and (not is_integer(group) or not 1 <= group <= _MAX_GROUP):
        raise FileFormatError(f"The checkpoint {path} is damaged: its record has no valid latent_group.")
    if "collector" in record and record.get("replay") is None:
        raise FileFormatError(f"The checkpoint {path} is damaged: it has a collector but no replay.")


def _fits(arrays: Mapping[str, Any], template: Any, path: Path) -> bool:
    """Whether ``arrays`` have the names, shapes and dtypes of ``template``, and no other name that begins like them."""
    expected = _flatten(template)
    try:
        _fit(arrays, template, path)
    except FileFormatError:
        return False
    return all(name in expected for name in arrays if name.partition("/")[0] in template)


def _empty_arrays(record: Mapping[str, Any], path: Path) -> dict[str, np.ndarray]:
    """Arrays of size zero, from the shapes and dtypes in the record; :func:`arrays_to_save` leaves them out."""
    try:
        specs = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in record.get("empty", {}).items()}
        if any(0 not in shape or dtype.hasobject for shape, dtype in specs.values()):
            raise ValueError("an array is not empty")
        return {name: np.zeros(shape, dtype) for name, (shape, dtype) in specs.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(f"The checkpoint {path} has an invalid list of empty arrays: {error}.") from error


def _save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write ``arrays`` as the folder ``path``. Raises ``CheckpointError`` if Orbax warns of anything."""
    import orbax.checkpoint as ocp

    with (
        plain_path(path.parent) as folder,
        orbax_warnings() as warned,
        checkpointer() as orbax,
        full_disk_errors(path),
    ):
        orbax.save(folder / path.name, args=ocp.args.PyTreeSave({name: np.asarray(x) for name, x in arrays.items()}))
    if warned:
        raise CheckpointError(f"Orbax warned: {warned[0]}")


def _load_arrays(path: Path, template: Any, *, extra: bool = False) -> dict[str, np.ndarray]:
    """The arrays of ``template`` by name, and with ``extra`` those with the prefix ``_EXTRA``.

    Shapes and sizes are checked against the file's metadata before memory is allocated.
    """
    saved, needed = _saved_shapes(path), _flatten(template)
    layout = OptimizerLayout.between(saved, needed)
    _fit(layout.shapes(saved), template, path)
    extras = {name: value for name, value in saved.items() if extra and name.startswith(_EXTRA)}
    if sum(value.size * value.dtype.itemsize for value in extras.values()) > _MAX_EXTRA:
        raise FileFormatError(f"{path} holds more than {_MAX_EXTRA} bytes in addition to the state.")
    sources = (source for name in needed for source in layout.sources(name))
    requested = {name: saved[name] for name in sources if name in saved} | extras
    shardings = {name: getattr(needed[name], "sharding", None) for name in needed.keys() & requested}
    on_mesh = {name: sharding for name, sharding in shardings.items() if isinstance(sharding, NamedSharding)}
    with _reading(path), plain_path(path) as folder:
        return layout.convert(_restore(folder / "state", requested, on_mesh))


def _saved_shapes(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays of a checkpoint by name."""

    with _reading(path), plain_path(path) as folder, checkpointer() as orbax:
        entries = orbax.metadata(folder / "state").item_metadata.tree
        return {name: jax.ShapeDtypeStruct(entry.shape, entry.dtype) for name, entry in entries.items()}


def _restore(
    state: Path,
    requested: Mapping[str, Any],
    shardings: Mapping[str, NamedSharding] = types.MappingProxyType({}),
) -> dict[str, Any]:
    """The ``requested`` arrays, of these shapes, in Orbax's folder ``state``: NumPy's, or JAX's with ``shardings``."""
    import orbax.checkpoint as ocp

    options = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in requested}
    for name, sharding in shardings.items():
        array = requested[name]
        options[name] = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=array.shape, dtype=array.dtype)
    arguments = ocp.args.PyTreeRestore(dict(requested), restore_args=options, partial_restore=True)
    with checkpointer() as orbax:
        return orbax.restore(state, args=arguments)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what Orbax raises for an unreadable checkpoint into ``FileFormatError``."""
    try:
        yield
    except (FileFormatError, MemoryError):
        raise
    except Exception as error:
        # A dozen different exceptions, with no common base class.
        raise FileFormatError(f"The checkpoint arrays {path / 'state'} cannot be read: {error}") from error


def checksums(folder: Path, without: Collection[str] = frozenset()) -> Iterator[tuple[str, list[Any]]]:
    """Name, and [size in bytes, SHA-256], of each file in a checkpoint folder except the manifest and ``without``."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise FileFormatError(f"{path} is neither a file nor a folder; a checkpoint holds nothing else.")
        if path.is_file() and name != "manifest.json" and name not in without:
            with path.open("rb") as file:
                yield name, [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, max_bytes=_MAX_JSON)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=1))
