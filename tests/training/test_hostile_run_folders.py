"""A hundred run folders that somebody made up: documented errors only, nothing outside is touched, nothing imported."""

import hashlib
import json
import os
import shutil
import sys
import warnings

import pytest
from toy_family import ToyConfig, ToyWorldModel

from worldloom import WorldloomError, load_policy
from worldloom.acting.loading import load_run_model
from worldloom.cli.about import _run_report
from worldloom.envs import make_env
from worldloom.errors import ConfigError
from worldloom.models.registry import from_pretrained
from worldloom.training import RunFolder, Trainer, TrainingConfig
from worldloom.training.checkpoint_files import checksums

CONFIG = TrainingConfig(
    batch_size=4, sequence_length=3, device="cpu", prefill=20, total_steps=6, eval_interval=0, save_interval=3
)
MARKER = "evil_module_of_a_folder"
STRANGE = [
    None, True, -1, 2**63, 10**400, 1e308, "", "x", "../../outside", "\ud800", [], {}, [[[]]], {"a": {"b": [1]}},
    "a" * 5000, [1] * 5000, [2**40], f"{MARKER}:Id-v0",
]  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run that ended, an outside folder, and a module that must not be imported."""
    base = tmp_path_factory.mktemp("hostile")
    run = RunFolder(base / "run")
    with make_env("MountainCarContinuous-v0", time_limit=20) as env:
        model = ToyWorldModel(ToyConfig(obs_shape=env.obs_shape, action_dim=env.action_dim, latents=True))
        Trainer(model, CONFIG, run.callbacks(env, progress=False)).train(env)
    (base / "outside").mkdir()
    for name in ("file", "rows-000000000000-4-0123456789abcdef.chunk", "rows-000000000000.partial", "run.json"):
        (base / "outside" / name).write_text("{}")
    (base / "modules").mkdir()
    (base / "modules" / f"{MARKER}.py").write_text("raise SystemExit('imported')")
    return base


def digest(folder):
    return {
        path.relative_to(folder).as_posix(): (path.lstat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def forge(checkpoint):
    """Make the checksums of a checkpoint right again."""
    (checkpoint / "manifest.json").write_text(json.dumps({"files": dict(checksums(checkpoint))}))


def put(path, *keys, value):
    """Replace the value at ``keys`` in a JSON file."""
    tree = data = json.loads(path.read_text())
    for key in keys[:-1]:
        tree = tree[key]
    tree[keys[-1]] = value
    path.write_text(json.dumps(data))


def in_config(*keys, every=2):
    """Cases with a strange value in ``config.json``."""
    cases = [(value, lambda run, v=value: put(run / "config.json", *keys, value=v)) for value in STRANGE]
    return [(f"config {'.'.join(keys)}={value!r:.20}", case) for value, case in cases[::every]]


def in_record(*keys):
    """Cases with a strange value in the record of the newest checkpoint, and with checksums that fit."""

    def change(run, value):
        put(run / "checkpoints" / "6" / "run.json", *keys, value=value)
        forge(run / "checkpoints" / "6")

    cases = [(value, lambda run, v=value: change(run, v)) for value in STRANGE]
    return [(f"record {'.'.join(keys)}={value!r:.20}", case) for value, case in cases[len(keys) % 3 :: 4]]


def in_manifest(name, value):
    return lambda run: put(run / "checkpoints" / "6" / "manifest.json", "files", name, value=value)


def link(name, target):
    def change(run):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(run.parent / target)

    return change


def text(name, content):
    return lambda run: (run / name).write_bytes(content)


CASES = [
    *in_config("model", "obs_shape"), *in_config("env", "spec", every=1), *in_config("env"),
    *in_config("model", every=4), *in_config("training", every=4), *in_config("spaces", every=4),
    *in_config("model_class", every=4),
    *in_config("training", "batch_size", every=4), *in_config("model", "model_type", every=4),
    *in_record("replay"), *in_record("step"), *in_record("collector"), *in_record("callbacks"), *in_record("empty"),
    *in_record("config"), *in_record("value"), *in_record("callbacks", "states"), *in_record("collector", "ends"),
    ("manifest with ../", in_manifest("../../../outside/file", [2, "0" * 64])),
    ("manifest with an absolute path", in_manifest("/etc/passwd", [2, "0" * 64])),
    ("manifest with another sum", in_manifest("run.json", [2, "0" * 64])),
    ("manifest of a list", text("checkpoints/6/manifest.json", b"[]")),
    ("config as a link", link("config.json", "outside/file")),
    ("config as a link to a password file", link("config.json", "../../../../../etc/passwd")),
    ("checkpoints as a link", link("checkpoints", "outside")),
    ("a checkpoint as a link", link("checkpoints/6", "outside")),
    ("state as a link", link("checkpoints/6/state", "outside")),
    ("model as a link", link("model", "outside")),
    ("log as a link", link("metrics.jsonl", "outside/file")),
    ("log as a dangling link", link("metrics.jsonl", "outside/new")),
    ("versions as a link", link("versions.json", "outside/file")),
    ("lock as a link", link("run.lock", "outside/file")),
    ("a deeply nested config", text("config.json", b'{"format": 1, "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
    ("a key twice", text("config.json", b'{"format": 1, "format": 1, "run_id": "x", "model": {}, "training": {}}')),
    ("a number of 5000 digits", text("config.json", b'{"format": ' + b"1" * 5000 + b"}")),
    ("a config of two megabytes", text("config.json", b'{"format": 1, "a": "' + b"x" * (2 << 20) + b'"}')),
    ("not UTF-8", text("config.json", b"\xff\xfe{}")),
    ("a log of nonsense", text("metrics.jsonl", b"\xff[[[\n{}\n3\n" + b"[" * 10_000)),
    ("versions of nonsense", text("versions.json", b"\xff")),
    ("spaces of nonsense", text("model/spaces.json", b'{"observation": 3}')),
    ("weights of nonsense", text("model/model.safetensors", b"\xff" * 100)),
    ("a saved config of impossible size", text("model/config.json", b'{"model_type": "toy", "obs_shape": [1e400]}')),
]  # fmt: skip


def use(run):
    """Everything that opens a run folder without training into it."""
    yield "settings", run.settings
    yield "title", run.title
    yield "report", lambda: list(_run_report(run))
    yield "env_spaces", run.env_spaces
    yield "make_env", lambda: run.make_env(num_envs=1).close()
    yield "load_run_model", lambda: load_run_model(run, device="cpu")
    yield "load_policy", lambda: load_policy(run.path, device="cpu")
    yield "best", lambda: load_run_model(run, "best", device="cpu")
    yield "from_pretrained", lambda: from_pretrained(run.path / "model", device="cpu")


def resume(run):
    """Training into the folder: it may write there."""
    with make_env("MountainCarContinuous-v0", time_limit=20) as env:
        model = ToyWorldModel(ToyConfig(obs_shape=env.obs_shape, action_dim=env.action_dim, latents=True))
        Trainer(model, CONFIG.replace(total_steps=7), run.callbacks(env, progress=False)).train(env, resume="auto")


def test_there_are_a_hundred_folders():
    assert len(CASES) >= 100


# Orbax stops at the first unreadable array; the errors of the others arrive when nothing awaits them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("start", range(0, len(CASES), 40))
def test_hostile_folders_raise_documented_errors_and_touch_nothing(original, tmp_path, monkeypatch, start):
    monkeypatch.syspath_prepend(str(original / "modules"))
    shutil.copytree(original / "outside", tmp_path / "outside")
    outside, problems = digest(tmp_path / "outside"), []
    for name, change in CASES[start : start + 40]:
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original / "run", folder)
        change(folder)
        before = digest(folder)
        for action, call in use(RunFolder(folder)):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    call()
            except WorldloomError:
                pass
            except BaseException as error:
                problems.append(f"{name}: {action} raised {error!r:.200}")
        if digest(folder) != before:
            problems.append(f"{name}: the folder was changed by opening it")
        # Whoever trains into a folder writes to where its own folders are, which may be another disk.
        own_disk = name not in ("checkpoints as a link", "model as a link")
        if name.startswith("record") or ("link" in name and own_disk):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    resume(RunFolder(folder))
            except (WorldloomError, OSError):
                pass
            except BaseException as error:
                problems.append(f"{name}: resume raised {error!r:.200}")
        if digest(tmp_path / "outside") != outside:
            problems.append(f"{name}: a file outside was touched")
            outside = digest(tmp_path / "outside")
    assert not problems, "\n".join(problems)
    assert MARKER not in sys.modules


def test_a_module_is_imported_only_if_it_is_trusted(original, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "made_for_a_run.py").write_text(
        "import gymnasium as gym\ngym.register('Made-v0', 'gymnasium.envs.classic_control:PendulumEnv')\n"
    )
    folder = tmp_path / "run"
    shutil.copytree(original / "run", folder)
    put(folder / "config.json", "env", "spec", value="made_for_a_run:Made-v0")
    with pytest.raises(ConfigError, match=r"would import the module 'made_for_a_run'.*--trust or --env made_for_a_run"):
        RunFolder(folder).make_env()
    assert "made_for_a_run" not in sys.modules
    RunFolder(folder).make_env(trust=True).close()
    assert "made_for_a_run" in sys.modules
    RunFolder(folder).make_env().close()  # It is imported already.
    del sys.modules["made_for_a_run"]


def test_sizes_are_compared_before_a_model_is_built(original, tmp_path, monkeypatch):
    """A config of any size, with a checkpoint of a few numbers."""
    folder = tmp_path / "run"
    shutil.copytree(original / "run", folder)
    monkeypatch.setattr(ToyWorldModel, "__init__", lambda *a, **k: pytest.fail("a model was built"))
    monkeypatch.setattr(ToyWorldModel, "abstract_params", classmethod(lambda *a: {"dynamics": {"kernel": Huge()}}))
    with pytest.raises(WorldloomError, match="does not fit this run"):
        load_run_model(RunFolder(folder), device="cpu")
    assert os.path.isdir(folder)


class Huge:
    """Shape and dtype of an array of a petabyte."""

    shape, dtype, size = (1 << 24, 1 << 24), "float32", 1 << 48
