"""A policy in a file acts as the model does, where worldloom cannot be imported, and damaged files say so."""

import contextlib
import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export as jax_export
from worlds import Arm, Buttons, Robot, World, equal, small

import worldloom
from worldloom import cli, policy_file
from worldloom.envs import EnvSpaces
from worldloom.errors import ConfigError, FileFormatError
from worldloom.export import export_policy
from worldloom.export.writer import _action_leaves, _observation_leaves
from worldloom.policy_file import PolicyFileError, load_policy
from worldloom.spaces.actions import ActionSpec
from worldloom.spaces.observations import ObservationSpec

PAIRS = {"dreamerv3-Robot": ("dreamerv3", Robot), "tdmpc2-Arm": ("tdmpc2", Arm), "tdmpc2-Buttons": ("tdmpc2", Buttons)}


@pytest.fixture(scope="module", params=PAIRS)
def exported(request, tmp_path_factory):
    """(path of a file, the model in it, its environment's spaces)."""
    family, env = PAIRS[request.param]
    model, own = small(family, env), EnvSpaces.of_env(env())
    path = export_policy(model, tmp_path_factory.mktemp("files") / "policy.worldloom", env=own)
    return path, model, own


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """A file for the CPU only, of one environment."""
    path = tmp_path_factory.mktemp("files") / "arm.worldloom"
    return export_policy(small("dreamerv3"), path, env=EnvSpaces.of_env(Arm()), num_envs=1, platforms="cpu")


def play(policy, other, space, steps, count):
    """Observations and the actions of both, over episodes that end at different steps."""
    space.seed(0)
    for step in range(steps):
        obs = [space.sample() for _ in range(count)]
        batch = obs[0] if count == 1 else gym.vector.utils.concatenate(
            space, obs, gym.vector.utils.create_empty_array(space, count)
        )  # fmt: skip
        yield policy(batch), other(batch)
        if step % 7 == 3:
            index = step % count
            policy.reset(index)
            other.reset(index)


# ---- what it does ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sample", "greedy"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_file_acts_bit_for_bit_as_the_model(exported, mode, count):
    path, model, own = exported
    policy = model.policy(own, num_envs=count, mode=mode, seed=5)
    file = load_policy(path, num_envs=count, mode=mode, seed=5)
    assert file.plan == policy.plan
    for ours, theirs in play(policy, file, own.observation, 20, count):
        assert equal(ours, theirs)
        assert type(ours) is type(theirs)


def test_a_file_encodes_and_imagines_as_the_model(exported):
    path, model, own = exported
    file, spec = load_policy(path), ObservationSpec(own.observation)
    native = [own.observation.sample() for _ in range(4)]
    batch = gym.vector.utils.concatenate(
        own.observation, native, gym.vector.utils.create_empty_array(own.observation, 4)
    )
    state = model.encode(spec.unwrap(spec.flatten(batch, (4,))))
    latents = file.encode(batch)
    for name, expected in zip(latents, jax.tree.leaves(state), strict=True):
        assert np.array_equal(latents[name], expected)
        assert np.array_equal(latents[name], getattr(state, name))
    rng = np.random.default_rng(0)
    actions = {
        name: rng.integers(size, size=(5, 4)).astype(np.int32)
        if kind == "discrete"
        else rng.uniform(-1, 1, (5, 4, size)).astype(np.float32)
        for (name, size), kind in zip(
            worldloom.spaces.named(model.config.action_dim, "action").items(),
            worldloom.spaces.named(model.config.action_type, "action").values(),
            strict=True,
        )
    }
    actions = worldloom.spaces.unnamed(actions, len(actions) > 1)
    future, told = model.imagine(state, actions), file.imagine(latents, actions)
    np.testing.assert_allclose(told["rewards"], future.rewards, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(told["continues"], future.continues, rtol=1e-6, atol=1e-6)
    for name, expected in zip(latents, jax.tree.leaves(future.states), strict=True):
        assert told["latents"][name].shape == expected.shape
        np.testing.assert_allclose(told["latents"][name], expected, rtol=1e-6, atol=1e-6)


SCRIPT = """
import sys

import numpy as np

sys.modules["worldloom"] = None  # It cannot be imported.
for name in ("flax", "optax", "orbax", "gymnasium", "safetensors", "flatbuffers"):
    sys.modules[name] = None
from policy_file import load_policy

policy = load_policy(sys.argv[1], seed=3)
inputs = np.load(sys.argv[2])
actions = []
for step, obs in enumerate(inputs["obs"]):
    if inputs["is_first"][step]:
        policy.reset()
    actions.append(policy(obs))
np.save(sys.argv[3], actions)
assert not [name for name, module in sys.modules.items() if name.startswith("worldloom") and module is not None]
"""


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
def test_500_steps_without_worldloom_are_equal_bit_for_bit(family, tmp_path):
    model, own = small(family), EnvSpaces.of_env(Arm())
    export_policy(model, tmp_path / "policy.worldloom", env=own, platforms="cpu")
    (tmp_path / "policy_file.py").write_text(inspect.getsource(policy_file))
    (tmp_path / "act.py").write_text(SCRIPT)
    rng = np.random.default_rng(1)
    obs, is_first = rng.uniform(-2, 2, (500, 3)), rng.random(500) < 0.02
    np.savez(tmp_path / "inputs.npz", obs=obs, is_first=is_first)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "act.py", "policy.worldloom", "inputs.npz", "actions.npy"],
        cwd=tmp_path, env=environment, check=True, timeout=300,
    )  # fmt: skip
    policy, expected = model.policy(own, seed=3), []
    for step in range(500):
        if is_first[step]:
            policy.reset()
        expected.append(policy(obs[step]))
    actions = np.load(tmp_path / "actions.npy")
    assert np.std(actions, 0).min() > 0.01
    assert np.array_equal(actions, expected)


def test_a_file_holds_only_weights_that_are_used_and_programs_for_every_platform(exported):
    path, model, _ = exported
    with zipfile.ZipFile(path) as archive:
        manifest = json.loads(archive.read("manifest.json"))
        stored = sum(np.load(archive.open(f"weights/{i}.npy")).nbytes for i in range(len(manifest["weights"])))
    assert manifest["platforms"] == ["cpu", "cuda", "tpu"]
    assert stored <= sum(x.nbytes for x in jax.tree.leaves(model.params))
    names = [weight["name"] for weight in manifest["weights"]]
    assert not any(name.startswith(("slow_critic", "target")) for name in names)
    assert path.stat().st_size < stored + 1_500_000


def test_activations_can_be_bfloat16(tmp_path):
    model, own = small("dreamerv3"), EnvSpaces.of_env(Arm())
    path = export_policy(model, tmp_path / "half", env=own, platforms="cpu", precision="bfloat16")
    half, full = load_policy(path, mode="greedy"), model.policy(own, mode="greedy")
    for ours, theirs in play(full, half, own.observation, 5, 1):
        np.testing.assert_allclose(ours, theirs, atol=0.1)


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
@pytest.mark.parametrize(("own", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_everything_in_a_file_is_of_its_precision(tmp_path, family, own, asked):
    model, spaces = small(family, precision=own), EnvSpaces.of_env(Arm())
    path = export_policy(model, tmp_path / "policy", env=spaces, platforms="cpu", precision=asked)
    policy, full = load_policy(path, mode="greedy"), small(family, precision="float32").policy(spaces, mode="greedy")
    for ours, theirs in play(full, policy, spaces.observation, 3, 1):
        np.testing.assert_allclose(ours, theirs, atol=0.1)
    latents = policy.encode(spaces.observation.sample())
    dream = policy.imagine(latents, np.zeros((3, 1, model.config.action_dim), np.float32))
    for name, value in dream["latents"].items():
        # Latents of TD-MPC2 are float32 whatever it computes in.
        assert value.dtype == latents[name].dtype == (asked if family == "dreamerv3" else "float32")
    assert np.isfinite(dream["rewards"]).all()


def test_a_smaller_plan_can_be_exported(tmp_path):
    path = export_policy(
        small("tdmpc2"), tmp_path / "small", env=EnvSpaces.of_env(Arm()), planner={"mpc": False}, platforms="cpu"
    )
    assert load_policy(path).plan["mpc"] is False
    assert "mpc=False" in repr(load_policy(path))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_file_translates_spaces_as_the_library_does(data):
    """Every kind of space, nested and not: the same arrays for the model, the same actions for the environment."""
    own = EnvSpaces(data.draw(space_of(OBSERVATIONS)), data.draw(space_of(ACTIONS)))
    seed = data.draw(st.integers(0, 99))
    own.observation.seed(seed)
    obs, spec = own.observation.sample(), ObservationSpec(own.observation)
    expected = spec.flatten(obs)
    for leaf in json.loads(json.dumps(_observation_leaves(own), allow_nan=False)):
        value = policy_file._to_model(leaf, policy_file._at(obs, leaf)[None], 1)[0]
        assert value.dtype == expected[leaf["name"]].dtype
        assert np.array_equal(value, expected[leaf["name"]])
    actions, count = ActionSpec(own.action), 3
    drawn = worldloom.spaces.named(actions.sample(np.random.default_rng(seed), count), "action")
    drawn = {name: value * 1.5 if value.dtype == np.float32 else value for name, value in drawn.items()}
    native = {}
    for leaf in json.loads(json.dumps(_action_leaves(own), allow_nan=False)):
        value = policy_file._to_env(leaf, [list(drawn.values())[i] for i in leaf["outputs"]])
        native = policy_file._set(native, leaf["path"], value)
    checked = actions.check(worldloom.spaces.unnamed(drawn, actions.is_dict), np.zeros(count, bool))
    assert equal(policy_file._as_tuples(native), actions.to_env(checked))


OBSERVATIONS = [
    spaces.Box(-3, 3, (4,)),
    spaces.Box(-3, 3, (2, 3), np.float64),
    spaces.Box(0, 255, (5, 4), np.uint8),
    spaces.Box(0, 255, (6, 6, 3), np.uint8),
    spaces.Box(0, 1, (6, 6, 3)),
    spaces.Box(-5, 5, (3,), np.int32),
    spaces.Discrete(4),
    spaces.Discrete(3, start=-2),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiDiscrete([[2, 3], [4, 2]]),
    spaces.MultiBinary(3),
    spaces.MultiBinary((2, 2)),
    spaces.Tuple([spaces.Discrete(2), spaces.Box(-1, 1, (2,))]),
    spaces.Box(0, 255, (6, 6, 3), np.int64),
    spaces.Box(np.int16([-4, 0]), np.int16([0, 9]), dtype=np.int16),
]
ACTIONS = [
    spaces.Box(-3, 5, (2,)),
    spaces.Box(np.float32([0, -7]), np.float32([1e-3, 40])),
    spaces.Box(-1, 2, (2, 2), np.float64),
    spaces.Box(-1, 9, (2,), np.int64),
    spaces.Box(np.float32([0, 3]), np.float32([2, 3])),
    spaces.Discrete(3),
    spaces.Discrete(2, start=5),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiBinary(2),
    spaces.Tuple([spaces.Discrete(2), spaces.Box(-1, 1, (2,))]),
    spaces.Box(-2, 5, (2,), np.int32),
    spaces.Box(np.float32([1, -1]), np.float32([1, 2])),
]


def space_of(kinds):
    single = st.sampled_from(kinds)
    inner = st.dictionaries(st.sampled_from("abcd"), single, min_size=1, max_size=3).map(spaces.Dict)
    nested = st.dictionaries(st.sampled_from("efg"), st.one_of(single, inner), min_size=1, max_size=3).map(spaces.Dict)
    tuples = st.lists(st.one_of(single, inner), min_size=1, max_size=3).map(spaces.Tuple)
    return st.one_of(single, inner, nested, tuples)


# ---- doors ---------------------------------------------------------------------------------------------------------


def rewritten(source, target, change):
    """A copy of a file whose entries ``change`` may edit, with sums that are right again."""
    with zipfile.ZipFile(source) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(entries.pop("manifest.json"))
    change(manifest, entries)
    sha = hashlib.sha256
    manifest["sha256"] = {name: sha(data).hexdigest() for name, data in entries.items()}
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("manifest.json", json.dumps(manifest))
        for name, data in entries.items():
            archive.writestr(name, data)
    return target


def test_a_truncated_file_is_refused_with_a_sentence(arm, tmp_path):
    data = arm.read_bytes()
    for size in [0, 1, 100, len(data) // 2, len(data) - 1000, len(data) - 1]:
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(PolicyFileError, match="damaged or no policy file"):
            load_policy(tmp_path / "cut")


def test_a_changed_byte_is_noticed_wherever_it_is(arm, tmp_path):
    data = arm.read_bytes()
    with zipfile.ZipFile(arm) as archive:
        starts = [(info.header_offset + 30 + len(info.filename), info.file_size) for info in archive.infolist()]
    for start, size in starts:
        changed = bytearray(data)
        changed[start + size // 2] ^= 0x41
        (tmp_path / "changed").write_bytes(changed)
        with pytest.raises(PolicyFileError, match="damaged"):
            load_policy(tmp_path / "changed")


def test_a_file_for_another_platform_is_refused_with_a_sentence(tmp_path):
    path = export_policy(small("dreamerv3"), tmp_path / "gpu", env=EnvSpaces.of_env(Arm()), platforms=["cuda", "tpu"])
    with pytest.raises(PolicyFileError, match=r"exported for cuda, tpu, and this device is cpu\. Export it with"):
        load_policy(path)
    with pytest.raises(FileFormatError, match="this device is cpu"):
        worldloom.load_policy(path)


def test_files_of_other_versions_are_refused_with_a_sentence(arm, tmp_path):
    for change, sentence in [
        (lambda manifest, _: manifest.update(version=2), "has layout 2; this reader knows layout 1"),
        (lambda manifest, _: manifest.update(calling_convention_version=99, jax="9.9"), r"JAX '9\.9' .*reads 9 to"),
        (lambda manifest, _: manifest.update(format="another"), "no policy file"),
    ]:
        with pytest.raises(PolicyFileError, match=sentence):
            load_policy(rewritten(arm, tmp_path / "other", change))


def test_a_program_that_this_version_of_jax_cannot_read_is_not_called_damaged(arm, tmp_path):
    path = rewritten(
        arm, tmp_path / "newer", lambda _, entries: entries.update({"programs/sample.mlir": b"ML\xefR???"})
    )
    with pytest.raises(PolicyFileError, match=r"cannot read the program 'sample' of .*, written with JAX"):
        load_policy(path)


def test_loading_runs_no_code(arm, tmp_path, monkeypatch):
    """Pickles, calls out of a program, compressed entries and names outside the archive."""

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    def pickled(manifest, entries):
        file = (tmp_path / "trap.npy").open("wb")
        with file:
            np.save(file, np.array([Trap()], object), allow_pickle=True)
        entries["weights/0.npy"] = (tmp_path / "trap.npy").read_bytes()

    def calls_out(target):
        def change(manifest, entries):
            def program(x):
                return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((2,), jnp.float32))(x)

            checks = [jax_export.DisabledSafetyCheck.custom_call(target)]
            made = jax_export.export(jax.jit(program), platforms=["cpu"], disabled_checks=checks)(jnp.zeros(2))
            entries["programs/sample.mlir"] = made.mlir_module_serialized

        return change

    with pytest.raises(PolicyFileError, match="damaged"):
        load_policy(rewritten(arm, tmp_path / "pickle", pickled))
    assert not (tmp_path / "ran").exists()
    for target in ["xla_ffi_python_cpu_callback", "anything at all", "shape_assertion_"]:
        with pytest.raises(PolicyFileError, match="may run code outside of XLA"):
            load_policy(rewritten(arm, tmp_path / "call", calls_out(target)))
    with zipfile.ZipFile(arm) as archive, zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in archive.namelist():
            bomb.writestr(name, archive.read(name))
    with pytest.raises(PolicyFileError, match="not stored as it should be"):
        load_policy(tmp_path / "bomb")


def test_programs_that_exchange_data_with_the_host_are_refused(arm, tmp_path):
    """Infeed and outfeed need no custom call."""

    def change(manifest, entries):
        def program(x):
            return jax.pure_callback(lambda y: y, jax.ShapeDtypeStruct((2,), jnp.float32), x)

        lowered = jax.jit(program).lower(jnp.zeros(2))
        text = lowered.as_text()
        assert policy_file._FORBIDDEN.search(text)

    rewritten(arm, tmp_path / "callback", change)
    for line in ['"stablehlo.outfeed"(%0, %1)', "%2 = stablehlo.send %0", "stablehlo.custom_call @evil(%0)"]:
        assert policy_file._FORBIDDEN.search(line)
    for line in ["stablehlo.custom_call @shape_assertion(%0)", "stablehlo.add %0, %1"]:
        found = policy_file._FORBIDDEN.search(line)
        assert found is None or found[1] == "shape_assertion"


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_hostile_manifests_are_refused_with_a_sentence(arm, tmp_path_factory, data):
    values = st.one_of(st.none(), st.integers(-5, 2**70), st.text(max_size=5), st.lists(st.integers(), max_size=2))

    def change(manifest, entries):
        place, key = (
            manifest,
            data.draw(st.sampled_from(["weights", "carry", "programs", "plan", "calling_convention_version"])),
        )
        while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
            place = place[key]
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if data.draw(st.booleans()) and isinstance(place, dict):
            del place[key]
        else:
            place[key] = data.draw(values)

    path = rewritten(arm, tmp_path_factory.mktemp("hostile") / "file", change)
    policy = None
    with contextlib.suppress(PolicyFileError):
        policy = load_policy(path)
    # Changes of what is only told (names, the plan) leave a policy that acts.
    assert policy is None or np.isfinite(policy(np.zeros(3))).all()


def test_bad_arguments_and_observations_are_refused(arm, tmp_path):
    for options, sentence in [
        ({"mode": "best"}, "mode must be"),
        ({"seed": -1}, "seed must be"),
        ({"num_envs": 2}, "acts in 1 environments, not 2"),
        ({"device": "abacus"}, "finds no device 'abacus'"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            load_policy(arm, **options)
    with pytest.raises(FileNotFoundError):
        load_policy(tmp_path / "nothing")
    file = load_policy(arm)
    before = file(np.ones(3))
    for obs in [np.ones(2), np.ones((2, 3)), np.full(3, np.nan), "abc", {"a": np.ones(3)}]:
        with pytest.raises(ValueError, match="observation"):
            file(obs)
    file.reset()
    file._calls = 0
    assert np.array_equal(file(np.ones(3)), before)
    with pytest.raises(ValueError, match="latents are called"):
        file.imagine({"x": np.ones((1, 2))}, np.ones((3, 1, 2)))
    model = small("dreamerv3")
    for options, sentence in [
        ({"platforms": ["gpu"]}, "platforms holds 'gpu'; there are cpu, cuda"),
        ({"platforms": []}, "platforms must name"),
        ({"num_envs": 0}, "num_envs must be"),
        ({"precision": "float16"}, "precision must be"),
        ({"planner": {"horizon": 3}}, "does not plan"),
        ({"env": EnvSpaces.of_env(Buttons())}, "obs_shape"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            export_policy(model, tmp_path / "never", **options)
    assert not (tmp_path / "never").exists()
    for options in [{"env": Arm()}, {"planner": {}}, {"max_ms": 3}, {"checkpoint": "best"}]:
        with pytest.raises(ConfigError, match="was decided when it was exported"):
            worldloom.load_policy(arm, **options)


def test_a_file_written_by_an_earlier_version_still_acts():
    """Recorded with JAX 0.10.2: what it answered then, to rounding, on every later version."""
    folder = Path(__file__).parents[1] / "data"
    recorded = np.load(folder / "policy-v1.npz")
    for family in ["dreamerv3", "tdmpc2"]:
        file = load_policy(folder / f"policy-v1-{family}.worldloom", mode="greedy")
        actions = np.stack([file(obs) for obs in recorded["obs"]])
        np.testing.assert_allclose(actions, recorded[family], atol=2e-5)


class Elbow(World):
    observation_space = spaces.Box(-2, 2, (3,))
    action_space = spaces.Box(0, 9, (2,))


def test_the_command_line_writes_a_file_and_its_reader(tmp_path, capsys):
    model = small("tdmpc2", Elbow)
    model.remember_env_spaces(EnvSpaces.of_env(Elbow()).to_json())
    model.save_pretrained(tmp_path / "model")
    target = tmp_path / "out.worldloom"
    words = ["export", str(tmp_path / "model"), "--to", str(target), "--with-reader", "--num-envs", "1"]
    assert cli.main([*words, "--platforms", "cpu", "--planner", '{"iterations": 1}']) == 0
    printed = capsys.readouterr().out
    assert f"{target.stat().st_size:,} bytes" in printed
    assert (tmp_path / "policy_file.py").read_text() == inspect.getsource(policy_file)
    action = worldloom.load_policy(target)(np.zeros(3))
    assert Elbow.action_space.contains(action)
    assert worldloom.load_policy(target).plan["iterations"] == 1
    shutil.rmtree(tmp_path / "model")
    for words, sentence in [
        (["export", str(tmp_path / "model")], "model"),
        (["export", str(tmp_path), "--to", str(tmp_path)], "is a folder"),
        (["export", str(tmp_path), "--to", str(tmp_path / "a" / "b")], "there is no folder"),
    ]:
        assert cli.main(words) == 2
        assert sentence in capsys.readouterr().err
