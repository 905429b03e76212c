"""``resume="continue"`` takes along what fits, lists what changed, and says that exactness is given up."""

import json
import logging

import jax
import numpy as np
import pytest
from online_worlds import ONLINE_CONFIG, Glide, every_row, toy
from tiny_envs import Walk
from toy_family import ToyConfig, ToyWorldModel, fill

from worldloom.envs import make_env
from worldloom.errors import ConfigError
from worldloom.replay import ReplayBuffer
from worldloom.training import RunFolder, Trainer, collect
from worldloom.training.callbacks import CheckpointCallback
from worldloom.training.checkpoint_files import checksums


def train(folder, steps, *, resume=False, kind=Glide, num_envs=2, config=ONLINE_CONFIG, latents=True):
    with make_env(kind, num_envs, seed=3) as env:
        trainer = Trainer(toy(env, latents=latents), config, [CheckpointCallback(str(folder), save_best=False)])
        trainer.train(env, total_steps=steps, resume=resume)
    return trainer


@pytest.fixture
def saved(tmp_path):
    return train(tmp_path / "run", 10)


def rows_before(trainer, other):
    """Whether the first rows of ``trainer`` are those of ``other``."""
    mine, theirs = every_row(trainer.replay), every_row(other.replay)
    count = len(theirs["rewards"])
    return all(
        np.array_equal(mine[name][:count], theirs[name]) for name in ("obs", "rewards", "actions", "is_terminal")
    )


def test_without_changes_it_is_an_exact_resume(saved, tmp_path, caplog):
    whole = train(tmp_path / "whole", 16)
    trainer = train(tmp_path / "run", 16, resume="continue")
    jax.tree.map(np.testing.assert_array_equal, trainer.state.params, whole.state.params)
    assert "with changes" not in caplog.text


def test_a_setting_that_the_saved_run_did_not_have_yet_is_no_change(saved, tmp_path, caplog):
    for path in (tmp_path / "run").rglob("run.json"):
        record = json.loads(path.read_text())
        del record["training"]["latent_dtype"]
        path.write_text(json.dumps(record))
        manifest = {"files": dict(checksums(path.parent))}
        (path.parent / "manifest.json").write_text(json.dumps(manifest))
    train(tmp_path / "run", 12, resume="continue")
    assert "with changes" not in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"config": ONLINE_CONFIG.replace(learning_rate=1e-3)}, "learning_rate 0.01 → 0.001"),
        ({"config": ONLINE_CONFIG.replace(batch_size=3)}, "batch_size 4 → 3"),
        ({"config": ONLINE_CONFIG.replace(seed=5)}, "seed 42 → 5"),
        ({"num_envs": 1}, "2 → 1 environments; all environments begin new episodes"),
        ({"num_envs": 5}, "2 → 5 environments; all environments begin new episodes"),
    ],
)
def test_what_fits_is_taken_along_and_what_changed_is_listed(saved, tmp_path, caplog, options, said):
    if "num_envs" not in options:
        with pytest.raises(ConfigError, match="resume='continue'"):
            train(tmp_path / "run", 14, resume="auto", **options)
    trainer = train(tmp_path / "run", 14, resume="continue", **options)
    assert "Continuing from step 10" in caplog.text
    assert "not the one it would have been" in caplog.text
    assert said in caplog.text
    assert trainer.step == 14
    assert trainer.run.run_id == saved.run.run_id
    assert rows_before(trainer, saved)
    assert len(trainer.replay) > len(saved.replay)
    assert trainer.run.collector.decisions > saved.run.collector.decisions
    # One update per decision step goes on from where the run was.
    assert trainer.run.collector.decisions - saved.run.collector.decisions <= 3 * 5 + 4
    # And the run goes on exactly from what it then saved.
    again = train(tmp_path / "run", 15, resume="auto", **options)
    assert again.step == 15


def test_steps_taken_under_another_action_repeat_keep_their_number(saved, tmp_path):
    config = ONLINE_CONFIG.replace(env_steps=100)

    def go_on(resume, **options):
        with make_env(Glide, 2, seed=3, action_repeat=2) as env:
            callbacks = [CheckpointCallback(str(tmp_path / "run"), save_best=False)]
            trainer = Trainer(toy(env), config, callbacks)
            trainer.train(env, resume=resume, **options)
        return trainer.run.collector

    before = saved.run.collector
    after = go_on("continue", total_steps=14)
    assert after.decisions > before.decisions
    assert after.env_steps == before.env_steps + 2 * (after.decisions - before.decisions)
    assert after.decisions_at(after.env_steps) == after.decisions
    # The end of the run counts them too, and an exact resume knows them.
    end = go_on("auto")
    assert 100 - 2 * 2 * 2 <= end.env_steps <= 100


def test_the_weights_and_moments_are_those_of_the_checkpoint(saved, tmp_path):
    config = ONLINE_CONFIG.replace(learning_rate=1e-30)
    trainer = train(tmp_path / "run", 11, resume="continue", config=config)
    jax.tree.map(np.testing.assert_array_equal, trainer.state.params, saved.state.params)
    moments = [leaf for leaf in jax.tree.leaves(trainer.state.opt_state) if np.ndim(leaf)]
    assert any(np.abs(leaf).max() > 0 for leaf in moments)


def test_an_optimizer_that_does_not_fit_begins_with_an_empty_state(saved, tmp_path, caplog):
    class OtherOptimizer(ToyWorldModel):
        pass

    def init_state(model, training, key):
        import optax

        state = toy_init(model, training, key)
        return state.replace(opt_state=(state.opt_state, optax.EmptyState(), {"more": np.zeros(3, np.float32)}))

    def make_update(*args, **options):
        update = toy_update(*args, **options)

        def wrapped(state, batch, key):
            inner, metrics = update(state.replace(opt_state=state.opt_state[0]), batch, key)
            return inner.replace(opt_state=(inner.opt_state, *state.opt_state[1:])), metrics

        return wrapped

    import dataclasses

    algorithm = ToyWorldModel.algorithm
    toy_init, toy_update = algorithm.init_state, algorithm.make_update
    OtherOptimizer.algorithm = dataclasses.replace(algorithm, init_state=init_state, make_update=make_update)
    with make_env(Glide, 2, seed=3) as env:
        model = toy(env, OtherOptimizer, latents=True)
        trainer = Trainer(model, ONLINE_CONFIG, [CheckpointCallback(str(tmp_path / "run"), save_best=False)])
        trainer.train(env, total_steps=12, resume="continue")
    assert "the optimizer begins with an empty state" in caplog.text
    assert trainer.step == 12


def test_weights_that_do_not_fit_are_refused(saved, tmp_path):
    import dataclasses

    from flax import nnx

    class Wider(ToyWorldModel):
        @staticmethod
        def build(config, dtype, rngs):
            return {"dynamics": nnx.Linear(2, 2, rngs=rngs), "reward": nnx.Linear(2, 1, use_bias=False, rngs=rngs)}

    Wider.algorithm = dataclasses.replace(ToyWorldModel.algorithm)
    with make_env(Glide, 2, seed=3) as env:
        callbacks = [CheckpointCallback(str(tmp_path / "run"), save_best=False)]
        trainer = Trainer(toy(env, Wider, latents=True), ONLINE_CONFIG, callbacks)
        with pytest.raises(ConfigError, match="nothing can be taken along"):
            trainer.train(env, total_steps=12, resume="continue")


@pytest.mark.parametrize("capacity", [20, 500])
def test_replay_gets_the_new_capacity(saved, tmp_path, capacity):
    config = ONLINE_CONFIG.replace(replay_capacity=capacity)
    trainer = train(tmp_path / "run", 12, resume="continue", config=config)
    assert trainer.replay.capacity == capacity
    assert len(trainer.replay) <= capacity
    train(tmp_path / "run", 13, resume="auto", config=config)


def test_a_run_on_recorded_episodes_continues_in_environments_and_back(tmp_path, caplog):
    config, buffer = ONLINE_CONFIG, fill(ReplayBuffer(500))
    Trainer(ToyWorldModel(ToyConfig()), config, [CheckpointCallback(str(tmp_path))]).train(buffer, total_steps=4)
    trainer = train(tmp_path, 8, resume="continue", latents=False)
    assert trainer.step == 8
    assert "environments in place of recorded episodes" in caplog.text
    back = Trainer(ToyWorldModel(ToyConfig()), config, [CheckpointCallback(str(tmp_path))])
    back.train(buffer, total_steps=10, resume="continue")
    assert "recorded episodes in place of environments" in caplog.text


def test_continue_begins_a_run_where_there_is_none(tmp_path):
    assert train(tmp_path / "new", 2, resume="continue").step == 2


def test_a_trainer_given_other_environments_says_that_replay_begins_empty(caplog):
    with make_env(Walk, seed=1) as one, make_env(Walk, seed=2) as other, caplog.at_level(logging.WARNING, "worldloom"):
        trainer = Trainer(toy(one), ONLINE_CONFIG, [])
        trainer.train(one, total_steps=2)
        rows = len(trainer.replay)
        trainer.train(other, total_steps=4, replay=trainer.replay)
        assert "replay begins empty" not in caplog.text
        assert len(trainer.replay) > rows
        rows = len(trainer.replay)
        trainer.train(one, total_steps=6)
    assert f"replay begins empty, without the {rows} rows collected so far. Give replay=trainer.replay" in caplog.text


def test_a_run_folder_records_the_new_settings(tmp_path):
    run, buffer = RunFolder(tmp_path / "run"), fill(ReplayBuffer(500))
    for resume, size in ((False, 4), ("continue", 2)):
        config = ONLINE_CONFIG.replace(batch_size=size)
        trainer = Trainer(ToyWorldModel(ToyConfig()), config, run.callbacks(progress=False))
        trainer.train(buffer, total_steps=8 // size, resume=resume)
    assert run.settings()["training"]["batch_size"] == 2


@pytest.mark.parametrize("given", ["environments", "an id"])
def test_collecting_learns_nothing_and_trains_later(given):
    with make_env(Glide, 2, seed=3) as env:
        model = toy(env, latents=True)
        before = jax.tree.map(np.array, model.params)
        replay = collect(model, env, 30, seed=1)
        assert len(replay) >= 30
        jax.tree.map(np.testing.assert_array_equal, model.params, before)
        trainer = Trainer(model, ONLINE_CONFIG, [])
        trainer.train(env, total_steps=3, replay=replay)
        assert trainer.replay is replay
    if given == "an id":
        model = ToyWorldModel(ToyConfig())
        assert len(collect(model, "MountainCarContinuous-v0", 10)) >= 9
    with pytest.raises(ConfigError, match="env_steps must be"):
        collect(model, "MountainCarContinuous-v0", 0)
