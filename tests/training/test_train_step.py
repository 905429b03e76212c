"""The compiled update: results do not depend on the number of updates per call, nor on a non-finite update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_family
from toy_family import ToyConfig, ToyWorldModel, fill
from trees import assert_same, leaves

from worldloom import NonFiniteError
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer
from worldloom.training.callbacks import CheckpointCallback
from worldloom.training.update_loop import Learner, NonFiniteGuard, compiled_update, copy


def compiled(config, unrolled=False):
    """The compiled update of the toy family under ``config``."""
    arguments = (toy_family.make_update, ToyConfig(), config.of_update(), ToyWorldModel)
    return compiled_update(*arguments, toy_family.LOSS_TERMS, False, False, unrolled, ToyWorldModel.version())


def record(rows):
    """A callback function that appends the metrics of its step to ``rows``."""
    return lambda info: rows.append(dict(info.metrics))


def test_results_do_not_depend_on_updates_per_call(buffer, config):
    states, means = [], []
    for updates in (1, 3, 8):
        recorded = []
        trainer = Trainer(
            ToyWorldModel(ToyConfig()),
            config.replace(updates_per_call=updates),
            [(5, lambda info, recorded=recorded: recorded.append(dict(info.means)))],
        )
        states.append(trainer.train(buffer))
        means.append(recorded)
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])
    assert means[0] == means[1] == means[2]
    assert len(means[0]) == 4


@pytest.mark.parametrize(("shape", "updates"), [((4,), 8), ((8, 8, 1), 1)])
def test_models_of_images_do_one_update_per_call_on_a_cpu(config, caplog, shape, updates):
    trainer = Trainer(ToyWorldModel(ToyConfig(obs_shape=shape)), config.replace(updates_per_call=8, device="cpu"), [])
    assert trainer.run.capacity == updates
    assert bool(caplog.messages) == (updates == 1)


def test_a_callback_at_every_step_does_not_change_results(buffer, config):
    without = Trainer(ToyWorldModel(ToyConfig()), config.replace(updates_per_call=8), []).train(buffer)
    trainer = Trainer(ToyWorldModel(ToyConfig()), config.replace(updates_per_call=8), [(1, lambda info: None)])
    assert_same(without, trainer.train(buffer))


def test_update_n_reads_batch_n_and_key_n(buffer, config, model):
    trainer = Trainer(model, config, [])
    state = copy(trainer.state)
    trained = trainer.train(buffer, total_steps=3)
    update = jax.jit(toy_family.make_update(model.config, config, model_class=ToyWorldModel))
    for number in range(3):
        batch = buffer.sample(4, 5, seed=config.seed, update=number)
        del batch["row_ids"]
        state, _ = update(state, batch, jax.random.fold_in(state.key, number))
    for a, b in zip(leaves(trained).values(), leaves(state).values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_means_average_over_single_updates(buffer, config, model):
    rows, means = [], []
    Trainer(model, config, [(1, record(rows)), (10, lambda info: means.append(dict(info.means)))]).train(buffer)
    assert len(rows) == 20
    for number, mean in enumerate(means):
        for name, value in mean.items():
            expected = np.mean([row[name] for row in rows[10 * number : 10 * number + 10]])
            assert value == pytest.approx(expected, rel=1e-12)


def test_the_model_and_earlier_states_outlive_donation(buffer, config, model):
    before = model.params
    values = jax.tree.map(np.array, before)
    trainer = Trainer(model, config, [])
    first = trainer.train(buffer, total_steps=4)
    trained = model.params
    trainer.train(buffer, total_steps=8)
    assert int(first.step) == 4
    jax.tree.map(np.testing.assert_array_equal, before, values)
    jax.tree.map(np.testing.assert_array_equal, trained, first.params)
    assert not np.array_equal(model.params["dynamics"]["kernel"], trained["dynamics"]["kernel"])


def test_one_compilation_serves_a_run_its_continuation_and_other_runs(buffer, config, tmp_path):
    """Calls of different lengths, a further call of train, a resume, another seed and another number of updates."""
    compiled_update.cache_clear()
    callbacks = lambda: [(3, lambda info: None), CheckpointCallback(str(tmp_path), save_every=7)]  # noqa: E731
    trainer = Trainer(ToyWorldModel(ToyConfig()), config.replace(updates_per_call=4), callbacks())
    trainer.train(buffer, total_steps=10)
    trainer.train(buffer)
    resumed = Trainer(ToyWorldModel(ToyConfig()), config.replace(updates_per_call=4, total_steps=25), callbacks())
    resumed.train(buffer, resume=True)
    Trainer(ToyWorldModel(ToyConfig(), seed=1), config.replace(updates_per_call=4, seed=1), []).train(buffer)
    assert compiled(config)._call._cache_size() == 1


def test_unrolled_and_looped_updates_agree(buffer, config, model):
    results = []
    for unrolled in (False, True):
        step = compiled(config, unrolled=unrolled)
        learner, rows = Learner(copy(Trainer(model, config, []).state), NonFiniteGuard.create()), []
        for number, scale in enumerate((1, 1, np.float32(np.inf), 1)):  # no update is applied after a non-finite one
            batch = buffer.sample(4, 5, seed=0, update=number)
            del batch["row_ids"]
            stacked = jax.tree.map(lambda x: jnp.asarray(x)[None], batch | {"rewards": batch["rewards"] * scale})
            learner, output = step(learner, stacked, 1)
            rows.append((output.metrics[0], output.applied[0]))
        results.append((leaves(learner.state), rows))
    assert [bool(applied) for _, applied in results[1][1]] == [True, True, False, False]
    for looped, straight in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_allclose(straight, looped, rtol=1e-5, atol=1e-6)


def test_the_state_is_donated(buffer, config, model):
    step = compiled(config)
    state = copy(Trainer(model, config, []).state)
    batch = buffer.sample(4, 5, seed=0, update=0)
    del batch["row_ids"]
    stacked = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
    step(Learner(state, NonFiniteGuard.create()), stacked, 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))


def poisoned_config(config):
    """A config whose seed gives a first bad batch that is neither among the first two nor late."""
    return next(c for seed in range(99) if 2 < first_bad_step(c := config.replace(seed=seed)) < 8)


def poisoned():
    """A buffer in which only windows of the first episode overflow the reward loss."""
    return fill(ReplayBuffer(10_000), episodes=20, poison=6)


def first_bad_step(config):
    source = poisoned()
    return next(
        number + 1
        for number in range(1000)
        if (source.sample(4, 5, seed=config.seed, update=number)["rewards"] > 1e29).any()
    )


@pytest.mark.parametrize("updates", [1, 8])
def test_a_nonfinite_loss_stops_training_with_its_name_and_the_last_good_weights(config, updates):
    config = poisoned_config(config)
    bad = first_bad_step(config)
    clean = Trainer(ToyWorldModel(ToyConfig()), config, []).train(poisoned(), total_steps=bad - 1)
    model = ToyWorldModel(ToyConfig())
    trainer = Trainer(model, config.replace(updates_per_call=updates), [])
    with pytest.raises(NonFiniteError, match=rf"Step {bad}: reward = inf.*No checkpoint was saved"):
        trainer.train(poisoned())
    assert trainer.step == bad - 1
    assert_same(trainer.state, clean)
    jax.tree.map(np.testing.assert_array_equal, model.params, clean.params)


def test_reading_a_metric_reports_a_nonfinite_update_at_once(config, model):
    config = poisoned_config(config)
    bad = first_bad_step(config)
    steps = []

    def read(info):
        steps.append(info.step)
        assert np.isfinite(info.metrics["loss"])

    with pytest.raises(NonFiniteError, match=f"Step {bad}"):
        Trainer(model, config, [(1, read)]).train(poisoned())
    assert steps == list(range(1, bad + 1))


def test_nonfinite_updates_can_be_skipped_and_counted(config, model):
    source = poisoned()
    bad = [(source.sample(4, 5, seed=config.seed, update=n)["rewards"] > 1e29).any() for n in range(20)]
    rows, means = [], []
    callbacks = [(1, record(rows)), (20, lambda info: means.append(dict(info.means)))]
    state = Trainer(model, config.replace(skip_nonfinite=True), callbacks).train(source)
    assert int(state.step) == 20
    assert [row["skipped"] for row in rows] == np.cumsum(bad).tolist()
    assert np.isinf([row["loss"] for row in rows]).tolist() == bad
    good = [row["loss"] for row, skipped in zip(rows, bad, strict=True) if not skipped]
    assert means[0]["loss"] == pytest.approx(np.mean(good))
    assert all(np.isfinite(leaf).all() for leaf in leaves(state).values())
    # Adam does not count the skipped updates.
    assert int(state.opt_state[1].count) == 20 - sum(bad)
    assert jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key)
