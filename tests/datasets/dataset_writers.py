"""Writers of synthetic datasets, one for each format, from the format's documentation."""

import io
import json
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np


class Recorded(NamedTuple):
    """An episode of n steps: n + 1 observations, n actions, n rewards."""

    obs: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool


def recorded(count=6, obs_dim=3, action_dim=2, lengths=None, seed=0, discrete=False) -> list[Recorded]:
    rng = np.random.default_rng(seed)
    episodes = []
    for number in range(count):
        steps = lengths[number % len(lengths)] if lengths else int(rng.integers(4, 12))
        actions = rng.integers(0, 4, steps) if discrete else rng.uniform(-1, 1, (steps, action_dim)).astype(np.float32)
        episodes.append(
            Recorded(
                rng.normal(size=(steps + 1, obs_dim)).astype(np.float32),
                actions,
                rng.normal(size=steps).astype(np.float32),
                bool(number % 2),
            )
        )
    return episodes


def flat(episodes: list[Recorded], next_obs=True) -> dict[str, np.ndarray]:
    """The layout of D4RL: steps one after the other, terminals apart from timeouts."""
    ends = [np.arange(len(e.rewards)) == len(e.rewards) - 1 for e in episodes]
    arrays = {
        "observations": np.concatenate([e.obs[:-1] for e in episodes]),
        "actions": np.concatenate([e.actions for e in episodes]),
        "rewards": np.concatenate([e.rewards for e in episodes]),
        "terminals": np.concatenate([end & e.terminated for e, end in zip(episodes, ends, strict=True)]),
        "timeouts": np.concatenate([end & (not e.terminated) for e, end in zip(episodes, ends, strict=True)]),
    }
    return arrays | ({"next_observations": np.concatenate([e.obs[1:] for e in episodes])} if next_obs else {})


def write_hdf5(path: Path, episodes: list[Recorded], *, next_obs=True, **options: Any) -> Path:
    import h5py

    with h5py.File(path, "w") as file:
        for name, array in flat(episodes, next_obs).items():
            file.create_dataset(name, data=array, **options)
        file.create_dataset("metadata/algorithm", data="SAC")
    return path


def write_npz_folder(folder: Path, episodes: list[Recorded], *, compressed=False) -> Path:
    folder.mkdir()
    for number in range(0, len(episodes), 2):
        save = np.savez_compressed if compressed else np.savez
        save(folder / f"{number:03}.npz", **flat(episodes[number : number + 2]))
    return folder


def write_minari(folder: Path, episodes: list[Recorded]) -> Path:
    """A Minari dataset by Minari's own writer."""
    import gymnasium
    import minari
    from minari.data_collector import EpisodeBuffer

    dim = episodes[0].actions.shape[-1]
    minari.create_dataset_from_buffers(
        "test/made-v0",
        [
            EpisodeBuffer(
                id=number,
                observations=e.obs,
                actions=list(e.actions),
                rewards=list(e.rewards),
                terminations=[*[False] * (len(e.rewards) - 1), e.terminated],
                truncations=[*[False] * (len(e.rewards) - 1), not e.terminated],
            )
            for number, e in enumerate(episodes)
        ],
        observation_space=gymnasium.spaces.Box(-np.inf, np.inf, episodes[0].obs.shape[1:], np.float32),
        action_space=gymnasium.spaces.Box(-1, 1, (dim,), np.float32),
        algorithm_name="random",
        author="nobody",
        author_email="nobody@example.com",
        code_permalink="https://example.com",
        description="made in a test",
    )
    return folder / "test" / "made-v0"


def write_dreamer_chunks(folder: Path, episodes: list[Recorded], *, rows=7, streams=2) -> Path:
    """Chunks as ``embodied.core.replay`` saves them: rows of one environment, cut anywhere."""
    folder.mkdir()
    for stream in range(streams):
        columns: dict[str, list[Any]] = {}
        for e in episodes[stream::streams]:
            count = len(e.obs)
            place = np.arange(count)
            rest = np.zeros((1, *e.actions.shape[1:]), e.actions.dtype)
            entries = {
                "vector": e.obs,
                "action": np.concatenate([e.actions, rest]),
                "reward": np.concatenate([np.zeros(1, np.float32), e.rewards]),
                "is_first": place == 0,
                "is_last": place == count - 1,
                "is_terminal": (place == count - 1) & e.terminated,
                "dyn/deter": np.zeros((count, 4), np.float32),
                "stepid": np.zeros((count, 20), np.uint8),
            }
            for name, value in entries.items():
                columns.setdefault(name, []).append(value)
        arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
        total = len(arrays["reward"])
        starts = list(range(0, total, rows))
        for number, start in enumerate(starts):
            stop = min(start + rows, total)
            following = f"id{stream}x{number + 1}" if stop < total else "0"
            name = f"20250101T0000{number:02}F{stream:03}-id{stream}x{number}-{following}-{stop - start}.npz"
            np.savez_compressed(folder / name, **{key: value[start:stop] for key, value in arrays.items()})
    return folder


# ---- torch.save(TensorDict(...)) ----------------------------------------------------------------------------------


class _Storage:
    def __init__(self, key: str, kind: str, count: int):
        self.key, self.kind, self.count = key, kind, count


class _Name:
    """Stands for a global of a package that is not installed here."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class _Object:
    """An object that is pickled as ``cls.__new__(cls)`` with ``state`` or ``entries``."""

    def __init__(self, cls: _Name, state: Any = None, entries: Any = None):
        self.cls, self.state, self.entries = cls, state, entries


class _Call:
    def __init__(self, function: _Name, arguments: tuple[Any, ...]):
        self.function, self.arguments = function, arguments


class _Writer(pickle._Pickler):  # type: ignore[name-defined]
    """Python's own pickler, taught to write names of classes that do not exist here, and storages."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return ("storage", _Name("torch", obj.kind), obj.key, "cpu", obj.count)
        return None

    def save_name(self, obj: _Name) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())

    def save_call(self, obj: _Call) -> None:
        self.save(obj.function)
        self.save(obj.arguments)
        self.write(pickle.REDUCE)

    def save_object(self, obj: _Object) -> None:
        self.save(obj.cls)
        self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        if obj.entries is not None:
            self.write(pickle.MARK)
            for key, value in obj.entries.items():
                self.save(key)
                self.save(value)
            self.write(pickle.SETITEMS)
        if obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)

    dispatch[_Name] = save_name
    dispatch[_Call] = save_call
    dispatch[_Object] = save_object


_KINDS = {"float32": "FloatStorage", "int32": "IntStorage", "int64": "LongStorage", "float64": "DoubleStorage"}


def tensor(key: str, shape: tuple[int, ...], dtype: str, requires_grad=False) -> _Call:
    count = int(np.prod(shape))
    strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    storage = _Storage(key, _KINDS[dtype], count)
    hooks = _Call(_Name("collections", "OrderedDict"), ())
    return _Call(_Name("torch._utils", "_rebuild_tensor_v2"), (storage, 0, shape, strides, requires_grad, hooks))


def tensordict_pickle(shapes: dict[str, tuple[tuple[int, ...], str]], *, plain=False) -> bytes:
    """The ``data.pkl`` of a saved TensorDict whose tensors have these shapes and types, as tensordict 0.2 wrote it."""
    tensors = {name: tensor(str(number), *each) for number, (name, each) in enumerate(shapes.items())}
    batch = next(iter(shapes.values()))[0][:2]
    size = _Call(_Name("torch", "Size"), (batch,))
    held = _Object(_Name("tensordict.utils", "_StringOnlyDict"), entries=tensors)
    state = {
        "_safe": False,
        "_lazy": False,
        "_is_locked": False,
        "_last_op": None,
        "_tensordict": held,
        "_batch_size": size,
        "_device": _Call(_Name("torch", "device"), ("cpu",)),
        "_td_dim_names": None,
    }
    out = io.BytesIO()
    value = tensors if plain else _Object(_Name("tensordict.tensordict", "TensorDict"), state)
    _Writer(out, 2).dump(value)
    return out.getvalue()


def write_pt(path: Path, arrays: dict[str, np.ndarray], *, data_pkl: bytes | None = None, plain=False) -> Path:
    """The zip archive of ``torch.save``: stored entries, their data at multiples of 64 bytes."""
    shapes = {name: (array.shape, array.dtype.name) for name, array in arrays.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("data/data.pkl", data_pkl or tensordict_pickle(shapes, plain=plain))
        archive.writestr("data/byteorder", "little")
        for number, array in enumerate(arrays.values()):
            archive.writestr(f"data/data/{number}", np.ascontiguousarray(array).tobytes())
        archive.writestr("data/version", "3\n")
    return path


def multitask_arrays(episodes: list[Recorded], tasks: list[int]) -> dict[str, np.ndarray]:
    """Episodes of equal length as TD-MPC2's data have them: NaN action and reward in row 0."""
    nan = np.float32(np.nan)
    return {
        "obs": np.stack([e.obs for e in episodes]),
        "action": np.stack([np.concatenate([np.full_like(e.actions[:1], nan), e.actions]) for e in episodes]),
        "reward": np.stack([np.concatenate([[nan], e.rewards]) for e in episodes]),
        "task": np.stack([np.full(len(e.obs), task, np.int32) for e, task in zip(episodes, tasks, strict=True)]),
    }


def write_sparse_pt(path: Path, episodes: int, rows: int, obs_dim: int, action_dim: int, tasks: int) -> Path:
    """A file of that size whose observations, actions and rewards are a hole: it takes no room on disk."""
    shapes = {
        "obs": ((episodes, rows, obs_dim), "float32"),
        "action": ((episodes, rows, action_dim), "float32"),
        "reward": ((episodes, rows), "float32"),
        "task": ((episodes, rows), "int32"),
    }
    data = tensordict_pickle(shapes)
    names = ["data/data.pkl", "data/byteorder", *(f"data/data/{number}" for number in range(4))]
    sizes = [len(data), 6, *(int(np.prod(shape)) * 4 for shape, _ in shapes.values())]
    crcs = [zlib.crc32(data), zlib.crc32(b"little"), 0, 0, 0, 0]  # the readers of tensors do not look at theirs
    offsets, directory = [], b""
    with path.open("wb") as file:
        for name, size, crc in zip(names, sizes, crcs, strict=True):
            offsets.append(file.tell())
            # Sizes and offsets of 4 GiB and more are in the extra field of the zip64 format.
            file.write(_local_header(name, size, crc))
            if name.endswith("pkl"):
                file.write(data)
            elif name.endswith("byteorder"):
                file.write(b"little")
            else:
                file.seek(size, 1)
        at = file.tell()
        for name, size, offset, crc in zip(names, sizes, offsets, crcs, strict=True):
            directory += _central_header(name, size, offset, crc)
        file.write(directory)
        end = file.tell()
        count = len(names)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, end - at, at))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), 0xFFFFFFFF, 0))
    return path


def _local_header(name: str, size: int, crc: int) -> bytes:
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    return struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 33, crc, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra)) + (
        name.encode() + extra
    )


def _central_header(name: str, size: int, offset: int, crc: int) -> bytes:
    extra = struct.pack("<HHQQQ", 1, 24, size, size, offset)
    fixed = struct.pack(
        "<4s6H3L5H2L",
        *(b"PK\1\2", 45, 45, 0, 0, 0, 33, crc, 0xFFFFFFFF, 0xFFFFFFFF),
        *(len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF),
    )
    return fixed + name.encode() + extra


# ---- LeRobot --------------------------------------------------------------------------------------------------------


def write_lerobot(folder: Path, episodes: list[Recorded], *, version="v3.0", rewards=True, scale=1.0) -> Path:
    """Frames in Parquet files: one for each episode (version 2), or several episodes in a file (version 3)."""
    import pyarrow
    import pyarrow.parquet

    (folder / "meta").mkdir(parents=True)
    features = {
        "observation.state": {"dtype": "float32", "shape": [episodes[0].obs.shape[1]]},
        "observation.images.top": {"dtype": "video", "shape": [8, 8, 3]},
        "action": {"dtype": "float32", "shape": [episodes[0].actions.shape[1]]},
        "episode_index": {"dtype": "int64", "shape": [1]},
        "frame_index": {"dtype": "int64", "shape": [1]},
    }
    if rewards:
        features["next.reward"] = {"dtype": "float32", "shape": [1]}
    info = {"codebase_version": version, "total_episodes": len(episodes), "features": features, "fps": 10}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    actions = np.concatenate([e.actions for e in episodes]) * scale
    stats = {"action": {"min": [-scale] * actions.shape[1], "max": [scale] * actions.shape[1]}}
    if version.startswith("v3"):
        (folder / "meta" / "stats.json").write_text(json.dumps(stats))
    else:
        lines = [json.dumps({"episode_index": n, "stats": stats}) for n in range(len(episodes))]
        (folder / "meta" / "episodes_stats.jsonl").write_text("\n".join(lines))

    def table(numbers):
        chosen = [episodes[n] for n in numbers]
        state = np.concatenate([e.obs[:-1] for e in chosen])
        action = np.concatenate([e.actions for e in chosen]) * scale
        columns = {
            "observation.state": list(state),
            "action": list(action.astype(np.float32)),
            "episode_index": np.concatenate([np.full(len(episodes[n].rewards), n) for n in numbers]),
            "frame_index": np.concatenate([np.arange(len(episodes[n].rewards)) for n in numbers]),
        }
        if rewards:
            columns["next.reward"] = np.concatenate([e.rewards for e in chosen])
        return pyarrow.table({name: pyarrow.array(value) for name, value in columns.items()})

    data = folder / "data" / "chunk-000"
    data.mkdir(parents=True)
    half = len(episodes) // 2
    groups = [[n] for n in range(len(episodes))]
    if version.startswith("v3"):
        groups = [list(range(half)), list(range(half, len(episodes)))]
    for number, group in enumerate(groups):
        name = f"file-{number:03}.parquet" if version.startswith("v3") else f"episode_{number:06}.parquet"
        pyarrow.parquet.write_table(table(group), data / name, row_group_size=9)
    return folder
