"""Many members in one program are the runs that each of them would be alone."""

import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_worlds import CONFIG, DRIFT, KEYED, trainer_in, variant

from worldloom.envs import make_env
from worldloom.errors import ConfigError, FileFormatError
from worldloom.training import RunFolder, Trainer, many, train_many
from worldloom.training.callbacks import CheckpointCallback

LATENTS = {"latents": True}


@pytest.fixture(scope="module", autouse=True)
def family():
    """The toy family with windows across episodes, fresh rows first and stored latents, under its own name."""
    from worldloom.families import _registered

    before = _registered["toy"]
    kind = variant("LikeDreamer", cross_episodes=True, fresh_first=True)
    _registered["toy"] = before._replace(model_class=kind, algorithm=kind.algorithm)
    yield kind
    _registered["toy"] = before


def alone(kind, seed, env=DRIFT, **changes):
    """The same run by itself."""
    env = make_env(env, 2, seed=seed)
    trainer = trainer_in(env, kind, CONFIG.replace(seed=seed, **changes), latents=True)
    trainer.run.model.load_params(kind(trainer.model.config, seed=seed).params)
    trainer.train(env)
    return trainer


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    vary = {"learning_rate": [1e-2, 3e-3]}
    options = {"num_envs": 2, "model": LATENTS, "config": CONFIG, "save_interval": 20, "eval_interval": 0}
    return train_many("toy", DRIFT, [5, 6], vary, folder=folder, eval_at_end=False, **options)


def test_members_equal_single_runs(family, members):
    assert [(m.seed, m.settings["learning_rate"]) for m in members] == [(5, 1e-2), (6, 1e-2), (5, 3e-3), (6, 3e-3)]
    for member in members[1:3]:
        single = alone(family, member.seed, learning_rate=member.settings["learning_rate"])
        for one, other in zip(*map(jax.tree.leaves, (member.model.params, single.model.params)), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_members_keep_the_keys_in_the_states_of_their_environments(family, tmp_path):
    options = {"num_envs": 2, "model": LATENTS, "config": CONFIG, "eval_interval": 0, "folder": tmp_path}
    train_many("toy", KEYED, [5, 6], save_interval=20, total_steps=20, **options)
    found = train_many("toy", KEYED, [5, 6], save_interval=20, resume=True, **options)
    single = alone(family, 6, KEYED)
    for one, other in zip(*map(jax.tree.leaves, (found[1].model.params, single.model.params)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_members_saved_up_to_different_updates_go_on_from_the_last_one_in_common(family, tmp_path, caplog):
    options = {"num_envs": 2, "model": LATENTS, "config": CONFIG, "eval_interval": 0, "folder": tmp_path}
    options |= {"save_interval": 20, "eval_at_end": False}
    whole = train_many("toy", DRIFT, [5, 6], **options)
    # As a kill between the two saves of update 40 leaves them.
    shutil.rmtree(whole[1].run.checkpoints / "40")
    found = train_many("toy", DRIFT, [5, 6], resume=True, **options)
    assert "saved up to the updates [20, 40]: all go on from 20" in caplog.text
    for one, other in zip(whole, found, strict=True):
        for x, y in zip(*map(jax.tree.leaves, (one.model.params, other.model.params)), strict=True):
            np.testing.assert_array_equal(x, y)
        assert (other.run.checkpoints / "40").is_dir()
    shutil.rmtree(whole[1].run.checkpoints / "20")
    shutil.rmtree(whole[0].run.checkpoints / "40")
    with pytest.raises(ConfigError, match=r"whose newest are at \[20, 40\]"):
        train_many("toy", DRIFT, [5, 6], resume=True, **options)
    with pytest.raises(ConfigError, match=r"no checkpoint in .*seed7, and members begin together"):
        train_many("toy", DRIFT, [5, 6, 7], resume=True, **options)


def test_each_member_has_the_folder_of_a_run_and_is_resumed_alone(family, members):
    run = members[1].run
    assert run.path.name == "learning_rate=0.01-seed6"
    assert run.settings()["training"]["seed"] == 6
    assert len((run.path / "episodes.jsonl").read_text().splitlines()) > 5
    loaded = family.from_pretrained(run.path / "model")
    np.testing.assert_array_equal(loaded.params["reward"]["kernel"], members[1].model.params["reward"]["kernel"])
    env = make_env(DRIFT, 2, seed=6)
    config = run.training_config(total_steps=45)
    trainer = Trainer(loaded, config, callbacks=[CheckpointCallback(str(run.checkpoints))])
    trainer.train(env, resume=True)
    assert trainer.step == 45
    whole = alone(family, 6, total_steps=45)
    np.testing.assert_allclose(
        trainer.replay.take(np.arange(99))["obs"], whole.replay.take(np.arange(99))["obs"], atol=1e-5
    )


def test_a_summary_says_what_the_settings_reached(members):
    folder = members[0].run.path.parent
    groups = json.loads((folder / "summary.json").read_text())["groups"]
    assert [group["settings"] for group in groups] == [{"learning_rate": 1e-2}, {"learning_rate": 3e-3}]
    for group in groups:
        assert group["seeds"] == [5, 6]
        low, high = group["interval_95"]
        assert low <= group["iqm"] <= high
    assert (folder / "summary.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"vary": {"batch_size": [2, 4]}}, "'batch_size' cannot be varied in one program"),
        ({"vary": {"weight_decay": [0.0, 0.1]}}, "must hold different values, in float32, other than 0"),
        ({"vary": {"learning_rate": [1.00000001e-3, 1e-3]}}, "must hold different values, in float32"),
        ({"vary": {"learning_rate": 1e-3}}, r"'learning_rate'\] must be a list of numbers, such as .* not 0.001"),
        ({"vary": {"learning_rate": ["a"]}}, "must be a list of numbers"),
        ({"vary": {"learning_rate": np.ones((2, 2))}}, "must be a list of numbers"),
        ({"vary": {"learning_rate": [-1.0]}}, "learning_rate must be a number above 0"),
        ({"vary": ["learning_rate"]}, r"vary must be a dict, such as .* not \['learning_rate'\]"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"seeds": []}, "at least one"),
        ({"seeds": 8}, "seeds must be different integers ≥ 0, at least one, such as range.8., not 8"),
        ({"seeds": ["a"]}, "seeds must be different integers"),
        ({"seeds": [0.5, 1.7]}, "seeds must be different integers"),
        ({"seeds": [-1]}, "seeds must be different integers"),
        ({"seeds": [True]}, "seeds must be different integers"),
        ({"env": 5}, "give it a spec such as 'jax:Pendulum-v1', or an environment in JAX, not int"),
        ({"env": types.SimpleNamespace(reset=None)}, "not SimpleNamespace. .* lacks step, obs_shape"),
        ({"seed": 99}, "seeds of train_many are its argument seeds"),
        ({"loop": "host"}, "train_many trains on the device; loop='host'"),
        ({"env": "CartPole-v1"}, "impossible: the environments are not in JAX"),
    ],
)
def test_what_one_program_cannot_do_is_refused(options, text):
    arguments = {"env": DRIFT, "seeds": [0], "config": CONFIG} | options
    with pytest.raises(ConfigError, match=text):
        train_many("toy", **arguments)


@pytest.fixture
def untrained(family, monkeypatch, tmp_path):
    """``untrained(seeds, vary)``: the members of a run in which nothing is trained."""
    monkeypatch.setattr(many, "_fit", lambda *arguments: None)
    options = {"num_envs": 2, "model": LATENTS, "config": CONFIG, "folder": tmp_path}
    return lambda seeds, vary: train_many("toy", DRIFT, seeds, vary, **options)


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_numbers_of_numpy_and_jax_are_pythons_in_the_summary(untrained, tmp_path, array):
    members = untrained(array([3, 4]), {"grad_clip": array([10]), "learning_rate": array([1e-3], "float32")})
    assert [(type(m.seed), type(m.settings["grad_clip"])) for m in members] == [(int, int)] * 2
    assert members[0].run.path.name == "grad_clip=10-learning_rate=0.001-seed3"
    (group,) = json.loads((tmp_path / "summary.json").read_text())["groups"]
    assert group["settings"] == {"grad_clip": 10, "learning_rate": float(np.float32(1e-3))}


def test_values_that_agree_in_six_digits_have_folders_of_their_own(untrained, tmp_path):
    members = untrained([0], {"learning_rate": [1e-3, 1.0000005e-3, 2e-3], "train_ratio": [4.0]})
    names = [f"learning_rate={value}-train_ratio=4-seed0" for value in ("0.001", "0.0010000005", "0.002")]
    assert [m.run.path.name for m in members] == names
    groups = json.loads((tmp_path / "summary.json").read_text())["groups"]
    assert [group["runs"] for group in groups] == [[name] for name in names]


def test_callbacks_of_every_member_are_called_when_they_are_due(family, tmp_path):
    seen = {1: [], 2: []}
    own = lambda index: [(10, lambda info: seen[index + 1].append(info.step))] if index else []  # noqa: E731
    (tmp_path / "seed1").mkdir()
    (tmp_path / "seed1" / "metrics.jsonl").write_text('{"step": 1, "eval/return": 1e6}\n')
    options = {"num_envs": 2, "model": LATENTS, "config": CONFIG, "eval_interval": 0, "log_interval": 25}
    found = train_many("toy", DRIFT, [1, 2], folder=tmp_path, callbacks=own, **options)
    assert seen == {1: [], 2: [10, 20, 30, 40]}
    assert all(member.returns < 1e6 for member in found), "read from the folder of another run"


def test_a_folder_that_holds_runs_is_begun_anew_by_nobody(members):
    folder = members[0].run.path.parent
    before = sorted(folder.rglob("*"))
    options = {"num_envs": 2, "model": LATENTS, "config": CONFIG, "folder": folder}
    vary = {"learning_rate": [1e-2, 3e-3]}
    with pytest.raises(ConfigError, match=r"holds runs already: learning_rate=0.01-seed6.* resume=True"):
        train_many("toy", DRIFT, [7, 6], vary, **options)
    with pytest.raises(ConfigError, match=r"also holds learning_rate=0.003-seed5, .*-seed6, which its summary"):
        train_many("toy", DRIFT, [5, 6], {"learning_rate": [1e-2]}, resume=True, **options)
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(FileFormatError, match=r"no config.json. It holds the runs learning_rate=0.003-seed5, "):
        RunFolder(folder).settings()


def test_members_of_other_ratios_need_a_number_of_updates(family, tmp_path):
    options = {"num_envs": 2, "model": LATENTS, "config": CONFIG, "folder": tmp_path}
    with pytest.raises(ConfigError, match="give total_steps in place of env_steps"):
        train_many("toy", DRIFT, [1], {"train_ratio": [4.0, 8.0]}, env_steps=200, **options)
