"""The loop: it learns, goes on, calls callbacks as promised, and leaves nothing behind."""

import threading

import jax
import numpy as np
import pytest
from toy_family import MATRIX, ToyConfig, ToyWorldModel, fill

import worldloom.training
from worldloom import ConfigError, DataError
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer, TrainingConfig, train
from worldloom.training.callbacks import Callback, CheckpointCallback, StopTraining, every


def test_it_finds_the_known_answer(buffer, held_out):
    model = ToyWorldModel(ToyConfig(noise=0.0))
    before = Trainer(model, TrainingConfig(batch_size=4, sequence_length=5), []).evaluate(held_out)
    state = train(model, buffer, total_steps=1000, batch_size=16, sequence_length=8, learning_rate=1e-2, callbacks=[])
    assert int(state.step) == 1000
    np.testing.assert_allclose(model.params["dynamics"]["kernel"], MATRIX, atol=0.01)
    np.testing.assert_allclose(model.params["reward"]["kernel"][:, 0], [1.0, 0.0], atol=0.05)
    after = Trainer(model, TrainingConfig(batch_size=4, sequence_length=5), []).evaluate(held_out)
    assert after["loss"] < before["loss"] / 100


def test_going_on_equals_not_stopping(buffer, config):
    whole, parts = ToyWorldModel(ToyConfig()), ToyWorldModel(ToyConfig())
    Trainer(whole, config, []).train(buffer)
    trainer = Trainer(parts, config, [])
    for steps in (1, 9, 20):
        trainer.train(buffer, total_steps=steps)
        assert trainer.step == int(trainer.state.step) == steps
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)


def test_a_finished_run_has_nothing_to_do(buffer, config, model, caplog):
    trainer = Trainer(model, config, [])
    trainer.train(buffer)
    before = model.params
    trainer.train(buffer)
    assert "step 20 of total_steps=20 is done" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, before, model.params)


class Diary(Callback):
    """Notes every call."""

    def __init__(self, every, order=0, name="", pages=None):
        self.every, self.order, self.name = every, order, name
        self.pages = [] if pages is None else pages

    def on_train_begin(self, info):
        self.pages.append((self.name, "begin", info.step, dict(info.metrics)))

    def on_step(self, info):
        self.pages.append((self.name, "step", info.step))

    def on_eval(self, info, measurements):
        self.pages.append((self.name, "eval", info.step, dict(measurements)))

    def on_train_end(self, info):
        self.pages.append((self.name, "end", info.step))

    def close(self):
        self.pages.append((self.name, "close"))


def test_callbacks_are_called_in_order_at_their_steps(buffer, config, model):
    pages = []
    callbacks = [Diary(6, 1, "late", pages), Diary(None, 0, "normal", pages), Diary(12, -1, "early", pages)]
    Trainer(model, config, [*callbacks, every(12, lambda info: {"eval/x": 1.0})]).train(buffer, total_steps=12)
    begins = [(name, "begin", 0, {}) for name in ("early", "normal", "late")]
    evals = [(name, "eval", 12, {"eval/x": 1.0}) for name in ("early", "normal", "late")]
    assert pages == [
        *begins,
        ("normal", "step", 4),
        ("late", "step", 6),
        ("normal", "step", 8),
        ("early", "step", 12),
        ("normal", "step", 12),
        *evals,
        ("late", "step", 12),
        *((name, "end", 12) for name in ("early", "normal", "late")),
        *((name, "close") for name in ("early", "normal", "late")),
    ]


def test_a_callback_is_closed_however_training_ends(buffer, config, model):
    diary = Diary(1)

    def fail(info):
        raise KeyError("gone")

    with pytest.raises(KeyError) as caught:
        Trainer(model, config, [diary, (3, fail)]).train(buffer)
    assert "fail.on_step at step 3" in caught.value.__notes__[0]
    assert diary.pages[-1] == ("", "close")
    assert ("", "end", 3) not in diary.pages


def test_the_model_holds_the_weights_reached_when_a_callback_fails(buffer, config, model):
    def fail(info):
        if info.step == 3:
            raise KeyError("gone")

    trainer = Trainer(model, config, [(3, fail)])
    with pytest.raises(KeyError):
        trainer.train(buffer)
    again = ToyWorldModel(ToyConfig())
    Trainer(again, config, []).train(buffer, total_steps=3)
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
    assert int(trainer.train(buffer, total_steps=5).step) == 5


def test_stopping_is_asked_for_by_raising_too_and_others_still_look(buffer, config, model):
    diary = Diary(5)

    def stop(info):
        raise StopTraining("far enough")

    trainer = Trainer(model, config, [(5, stop), diary])
    trainer.train(buffer)
    assert trainer.step == 5
    assert (
        trainer.stop_reason
        == "test_stopping_is_asked_for_by_raising_too_and_others_still_look.<locals>.stop: far enough"
    )
    assert ("", "step", 5) in diary.pages
    assert ("", "end", 5) in diary.pages
    trainer.train(buffer, total_steps=6)
    assert trainer.step == 6


def test_what_a_callback_is_given_is_its_own(buffer, config, model):
    taken = []

    def take(info):
        taken.append((info, info.params(), info.model(), info.read_state()))
        info.params()["dynamics"]["kernel"][:] = np.nan

    Trainer(model, config, [(10, take)]).train(buffer)
    (early, params, twin, state), _ = taken
    again = ToyWorldModel(ToyConfig())
    Trainer(again, config, []).train(buffer, total_steps=10)
    jax.tree.map(np.testing.assert_array_equal, params, again.params)
    jax.tree.map(np.testing.assert_array_equal, twin.params, again.params)
    jax.tree.map(np.testing.assert_array_equal, state.params, again.params)
    assert int(state.step) == 10
    assert early.metrics["loss"] > 0  # read late, still that of step 10
    assert early.lr == pytest.approx(0.01)
    with pytest.raises(RuntimeError, match="state of step 10 is gone"):
        early.params()
    with pytest.raises(AttributeError):
        early.step = 3


def test_metrics_read_late_are_those_of_their_step(buffer, config, model):
    late, at_once = [], []
    Trainer(
        model, config, [(3, lambda info: late.append(info)), (3, lambda info: at_once.append(dict(info.means)))]
    ).train(buffer)
    assert [dict(info.means) for info in late] == at_once


def test_what_is_no_callback_is_refused(model, config):
    for wrong in (3, Diary, (print, 3), "log"):
        with pytest.raises(TypeError):
            Trainer(model, config, [wrong])


def test_answers_that_mean_nothing_are_refused(model, config, buffer):
    with pytest.raises(TypeError, match="returned True"):
        Trainer(model, config, [(1, lambda info: True)]).train(buffer)


def test_sources_that_do_not_fit_are_refused_at_the_door(model, config):
    trainer = Trainer(model, config, [])
    with pytest.raises(TypeError, match="ReplayBuffer is expected"):
        trainer.train([1, 2, 3])
    with pytest.raises(DataError, match="empty"):
        trainer.train(ReplayBuffer(10))
    wide = ReplayBuffer(100)
    wide.add_episode(np.zeros((9, 3), np.float32), np.zeros((8, 1), np.float32), np.zeros(8), np.zeros(8, bool))
    with pytest.raises(DataError, match="observations"):
        trainer.train(wide)
    with pytest.raises(DataError, match="50"):
        Trainer(model, config.replace(sequence_length=50), []).train(fill(ReplayBuffer(1000)))
    with pytest.raises(ConfigError, match="total_steps"):
        trainer.train(fill(ReplayBuffer(1000)), total_steps=0)
    assert trainer.step == 0


def memory(buffer):
    return buffer.take(np.arange(len(buffer))[:, None], latents=True)["context"]["memory"][:, 0]


def remembering():
    return fill(ReplayBuffer(10_000, latents={"memory": (1,)}), episodes=2, steps=6)


@pytest.mark.parametrize("capacity", [1, 3])
def test_latents_are_written_back_in_a_fixed_order(config, tmp_path, capacity):
    """Toy memory is the row's observation + the memory of the window's first row.

    A batch sees the latents of all groups of K updates but its own and the one before, whoever looks or saves when.
    """
    trained, followed = remembering(), remembering()
    callbacks = [CheckpointCallback(str(tmp_path), save_every=5), (7, lambda info: print(info.replay_size))]
    Trainer(ToyWorldModel(ToyConfig(latents=True)), config.replace(updates_per_call=capacity), callbacks).train(trained)

    unwritten = []
    for step in range(20):
        while unwritten and unwritten[0][0] // capacity <= step // capacity - 2:
            _, batch = unwritten.pop(0)
            fresh = batch["obs"][..., :1] + batch["context"]["memory"][:, None]
            followed.write_latents(batch["row_ids"], {"memory": fresh})
        unwritten.append((step, followed.sample(4, 6, seed=config.seed, update=step, latents=True)))
    assert np.abs(memory(trained)).max() > 1
    np.testing.assert_allclose(memory(trained), memory(followed), rtol=1e-6)


def test_a_run_with_latents_resumes_from_a_save_as_if_it_had_gone_on(config, tmp_path):
    """Given the replay content of that moment, which is for the buffer to keep."""

    def trainer(folder):
        callbacks = [CheckpointCallback(str(tmp_path / folder), save_every=5)]
        return Trainer(ToyWorldModel(ToyConfig(latents=True)), config, callbacks)

    whole, cut = remembering(), remembering()
    state = trainer("whole").train(whole)
    trainer("cut").train(cut, total_steps=10)
    resumed = trainer("cut").train(cut, resume=True)
    np.testing.assert_array_equal(memory(whole), memory(cut))
    jax.tree.map(np.testing.assert_array_equal, state.params, resumed.params)


def test_without_stored_latents_windows_are_plain(config, buffer):
    rows = []

    class Watching(ReplayBuffer):
        def sample(self, batch_size, sequence_length, *, latents, **options):
            rows.append((sequence_length, latents))
            batch = super().sample(batch_size, sequence_length, **options)
            return batch | {"context": {"memory": np.zeros((batch_size, 1), np.float32)}}

    Trainer(ToyWorldModel(ToyConfig(latents=True)), config, []).train(fill(Watching(999)), total_steps=2)
    assert set(rows) == {(5, False)}


def test_threads_end_with_training(buffer, config, model):
    before = set(threading.enumerate())
    Trainer(model, config, []).train(buffer)
    assert set(threading.enumerate()) == before


def test_an_error_while_sampling_reaches_the_caller(config, model, buffer):
    class Breaking:
        latents = ()

        def __len__(self):
            return 5

        def sample(self, *args, update, **options):
            if update >= 7:
                raise OSError("disk gone")
            return buffer.sample(*args, update=update, **options)

    trainer = Trainer(model, config, [])
    with pytest.raises(OSError, match="disk gone"):
        trainer.train(Breaking())
    assert trainer.step == 7


def test_two_trainers_do_not_disturb_each_other(buffer, config):
    """One in a thread, one here: each ends where it ends alone."""
    alone = [ToyWorldModel(ToyConfig()) for _ in range(2)]
    together = [ToyWorldModel(ToyConfig()) for _ in range(2)]
    seeds = [config.replace(seed=seed) for seed in (1, 2)]
    for model, seeded in zip(alone, seeds, strict=True):
        Trainer(model, seeded, []).train(buffer)
    thread = threading.Thread(target=lambda: Trainer(together[0], seeds[0], []).train(buffer))
    thread.start()
    Trainer(together[1], seeds[1], []).train(buffer)
    thread.join()
    for one, other in zip(alone, together, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_public_names():
    assert sorted(worldloom.training.__all__) == sorted(
        [
            *("ReplayBuffer", "RunFolder", "TrainState", "Trainer", "TrainingConfig"),
            *("evaluate", "play", "recipe", "train"),
        ]
    )
    for name in worldloom.training.__all__:
        assert callable(getattr(worldloom.training, name))
