"""Fuzzing of the readers of our own files: configs, weights, replay, checkpoints. As in ``test_hostile_files``.

Where a checksum would give the damage away, it is made right again: whoever forges a file can do that too.
``benchmarks/hostile_files.py`` runs 10,000 files and prints the figures.
"""

import contextlib
import copy
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from test_hostile_files import fuzz, mutate, repacked, write_zip

from worldloom import get_config
from worldloom.config import read_json_object
from worldloom.errors import ConfigError, FileFormatError
from worldloom.models.pretrained import read_safetensors
from worldloom.models.registry import config_from_dict
from worldloom.replay import ReplayBuffer, ReplayStore
from worldloom.training import TrainingConfig

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))  # toy_family

STRANGE = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1e308, float("nan"), float("inf"), "", "x", "../../x", [], {},
    [[[[]]]], {"a": {"b": [1]}}, {"": [3]}, [0], [2**40], [3, 0, 3], "a" * 10_000, [1] * 10_000, [64, 64, 3], ["a", 3],
    "O", "<f4", [[0], "O"], [[1 << 40], "<f4"], {"x": "y"},
]  # fmt: skip


def strange(rng):
    return copy.deepcopy(STRANGE[int(rng.integers(len(STRANGE)))])


def change(rng, tree):
    """Replace, remove or add one value somewhere in nested dicts and lists."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = keys[int(rng.integers(len(keys)))]
        inner = tree[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
            tree = inner
            continue
        match int(rng.integers(4)):
            case 0:
                del tree[key]
            case 1 if isinstance(tree, dict):
                tree[str(rng.choice(["x", "", "../x", str(key).upper()]))] = strange(rng)
            case _:
                tree[key] = strange(rng)
        return


def json_text(rng, text):
    """JSON with one to three values changed, or one time in three with bytes changed."""
    if rng.random() < 1 / 3:
        return mutate(text, rng)
    tree = json.loads(text)
    for _ in range(int(rng.integers(1, 4))):
        change(rng, tree)
    return json.dumps(tree).encode()


def json_file(rng, source, path):
    path.write_bytes(json_text(rng, source.read_bytes()))


# ---- configs and weights -----------------------------------------------------------------------------------------


def read_config(path):
    return config_from_dict(read_json_object(path))


def safetensors_file(rng, source, path):
    data = source.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 1 / 3:
        path.write_bytes(mutate(data, rng))
        return
    header = json_text(rng, data[8:end])
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


# ---- replay ------------------------------------------------------------------------------------------------------


def buffer():
    """Images, a dict of actions, latents, an episode in progress."""
    filled = ReplayBuffer(40, latents={"deter": (3,)})
    rng = np.random.default_rng(0)
    for n in range(24):
        obs = {"image": rng.integers(0, 256, (2, 4, 4, 1), dtype=np.uint8), "vector": rng.normal(size=(2, 2))}
        actions = {"aim": rng.integers(0, 3, 2), "move": rng.uniform(-1, 1, (2, 2))}
        first = np.full(2, n % 7 == 0)
        filled.add_rows(obs, actions, np.where(first, 0, n), first, [False] * 2, [False] * 2, task=[0, 1])
    return filled


def replay_bytes(rng, source, path):
    path.write_bytes(mutate(source.read_bytes(), rng))


def replay_member(rng, source, path):
    write_zip(path, repacked(source, rng))


def read_replay(path):
    with small_blocks():
        ReplayBuffer.load(path)


@contextlib.contextmanager
def small_blocks():
    """Smaller memory blocks: those of 32 MiB would hide how much a reader allocates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worldloom.replay.table.BLOCK_BYTES", 256)
        yield


def fresh_copy(source, path):
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    shutil.copytree(source, path)


def store_reference(rng, source, path):
    fresh_copy(source, path)
    json_file(rng, source / "reference.json", path / "reference.json")


def store_chunk(rng, source, path):
    """Changes one chunk file, and its name and checksum accordingly."""
    fresh_copy(source, path)
    reference = json.loads((path / "reference.json").read_text())
    kind = str(rng.choice(["rows", "latents"]))
    files = reference["chunks"][kind]["files"]
    entry = files[int(rng.integers(len(files)))]
    old = next(path.glob(f"{kind}-{entry['first']:012}-{entry['rows']}-*"))
    data = mutate(old.read_bytes(), rng)
    if rng.random() < 0.5:  # of the same size, so that more than the size is looked at
        size = old.stat().st_size
        data = data[:size].ljust(size, b"\0")
    entry["sha256"] = hashlib.sha256(data).hexdigest()
    old.unlink()
    (path / f"{kind}-{entry['first']:012}-{entry['rows']}-{entry['sha256'][:16]}.chunk").write_bytes(data)
    (path / "reference.json").write_text(json.dumps(reference))


def read_store(path):
    loaded = ReplayStore(path).load(read_json_object(path / "reference.json"))
    if len(loaded):
        loaded.take(np.arange(*loaded.state_dict().values())[:, None], latents=bool(loaded.latents))


# ---- checkpoints -------------------------------------------------------------------------------------------------


def checkpoint_part(rng, source, path, names):
    from worldloom.training.checkpoint_files import checksums

    fresh_copy(source, path)
    name = names[int(rng.integers(len(names)))]
    if name.endswith(".json") or "METADATA" in name:
        json_file(rng, source / name, path / name)
    else:
        (path / name).write_bytes(mutate((source / name).read_bytes(), rng))
    if name != "manifest.json":
        (path / "manifest.json").write_text(json.dumps({"files": dict(checksums(path))}))


def checkpoint_json(rng, source, path):
    checkpoint_part(rng, source, path, ["run.json", "manifest.json"])


def checkpoint_arrays(rng, source, path):
    # Of what Orbax writes, it reads these.
    files = [
        *(source / "state").glob("*METADATA"),
        source / "state" / "manifest.ocdbt",
        *(source / "state/d").iterdir(),
    ]
    checkpoint_part(rng, source, path, [p.relative_to(source).as_posix() for p in files])


def read_run(path):
    from worldloom.training.checkpoint_files import read_checkpoint

    run = template()
    return read_checkpoint(path, run.state, run.identity())


def template():
    """The state of a minimal run, created once."""
    from toy_family import ToyConfig, ToyWorldModel

    from worldloom.training import Trainer

    if not hasattr(template, "run"):
        template.run = Trainer(ToyWorldModel(ToyConfig()), TrainingConfig(device="cpu"), []).run
    return template.run


def write_sources(folder: Path) -> None:
    """Intact files and folders to start from."""
    from worldloom.training.checkpoint_files import Snapshot, write_checkpoint

    shapes = {"obs_shape": {"image": (3, 64, 64), "vector": (4,)}, "action_dim": {"aim": 2, "move": 3}}
    kinds = {"action_type": {"aim": "discrete", "move": "continuous"}}
    configs = {
        "tdmpc2": get_config("tdmpc2:tiny", obs_shape=(3,), action_dim=2),
        "dreamerv3": get_config("dreamerv3:tiny", **shapes, **kinds),
        "training": TrainingConfig(),
    }
    for name, config in configs.items():
        config.to_json(folder / f"{name}.json")
    arrays = {"a.b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.ones(4, np.int32)}
    (folder / "model.safetensors").write_bytes(save(arrays, metadata={"format": "worldloom"}))
    with small_blocks():
        filled = buffer()
    filled.save(folder / "replay.npz")
    (folder / "store" / "reference.json").parent.mkdir()
    (folder / "store" / "reference.json").write_text(json.dumps(ReplayStore(folder / "store").write(filled)))
    run = template()
    record = {"format": 1, "run_id": "x", "step": 0, "skipped": 0, "callbacks": {"states": {}}, "versions": {}}
    record |= run.identity()
    around = {"fresh/row_ids": np.arange(12).reshape(3, 4), "empty": np.zeros((0, 3))}
    write_checkpoint(folder / "checkpoint", Snapshot(run.state, record, around))


CASES = [
    (read_config, json_file, "tdmpc2.json"),
    (read_config, json_file, "dreamerv3.json"),
    (TrainingConfig.from_json, json_file, "training.json"),
    (read_safetensors, safetensors_file, "model.safetensors"),
    (read_replay, replay_bytes, "replay.npz"),
    (read_replay, replay_member, "replay.npz"),
    (read_store, store_reference, "store"),
    (read_store, store_chunk, "store"),
    (read_run, checkpoint_json, "checkpoint"),
    (read_run, checkpoint_arrays, "checkpoint"),
]
ALLOWED = (FileFormatError, ConfigError)


# Orbax stops at the first unreadable array; the errors of the others arrive when nothing awaits them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("read", "damage", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_damaged_folders_are_refused_quickly_and_in_little_memory(read, damage, name, sources, tmp_path):
    read(sources / name)
    figures = fuzz(read, damage, sources / name, tmp_path / "damaged", count=60, seed=0, allowed=ALLOWED)
    assert figures.refused > 20  # Some edits change a number or a name only.
