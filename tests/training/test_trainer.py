"""The trainer: it learns, continues, calls callbacks in order, refuses invalid arguments, and ends its threads."""

import shutil
import threading

import jax
import numpy as np
import pytest
from toy_family import MATRIX, ToyConfig, ToyWorldModel, fill

import worldloom.training
from worldloom import ConfigError, DataError
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer, TrainingConfig, callbacks, train
from worldloom.training.callbacks import Callback, CheckpointCallback, StopTraining, every


def test_training_finds_the_known_optimum(buffer, held_out):
    model = ToyWorldModel(ToyConfig(noise=0.0))
    before = Trainer(model, TrainingConfig(batch_size=4, sequence_length=5), []).evaluate(held_out)
    state = train(model, buffer, total_steps=1000, batch_size=16, sequence_length=8, learning_rate=1e-2, callbacks=[])
    assert int(state.step) == 1000
    np.testing.assert_allclose(model.params["dynamics"]["kernel"], MATRIX, atol=0.01)
    np.testing.assert_allclose(model.params["reward"]["kernel"][:, 0], [1.0, 0.0], atol=0.05)
    after = Trainer(model, TrainingConfig(batch_size=4, sequence_length=5), []).evaluate(held_out)
    assert after["loss"] < before["loss"] / 100


def test_several_calls_of_train_equal_a_single_one(buffer, config):
    whole, split = ToyWorldModel(ToyConfig()), ToyWorldModel(ToyConfig())
    Trainer(whole, config, []).train(buffer)
    trainer = Trainer(split, config, [])
    for steps in (1, 9, 20):
        trainer.train(buffer, total_steps=steps)
        assert trainer.step == int(trainer.state.step) == steps
    jax.tree.map(np.testing.assert_array_equal, whole.params, split.params)


def test_training_a_finished_run_logs_a_warning_and_changes_nothing(buffer, config, model, caplog):
    trainer = Trainer(model, config, [])
    trainer.train(buffer)
    before = model.params
    trainer.train(buffer)
    assert "step 20 of total_steps=20 is done" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, before, model.params)


class CallRecorder(Callback):
    """Records every call of its methods."""

    def __init__(self, every, order=0, name="", calls=None):
        self.every, self.order, self.name = every, order, name
        self.calls = [] if calls is None else calls

    def on_train_begin(self, info):
        self.calls.append((self.name, "begin", info.step, dict(info.metrics)))

    def on_step(self, info):
        self.calls.append((self.name, "step", info.step))

    def on_eval(self, info, measurements):
        self.calls.append((self.name, "eval", info.step, dict(measurements)))

    def on_train_end(self, info):
        self.calls.append((self.name, "end", info.step))

    def close(self):
        self.calls.append((self.name, "close"))


def test_callbacks_are_called_in_order_at_their_steps(buffer, config, model):
    calls = []
    callbacks = [
        CallRecorder(6, 1, "late", calls),
        CallRecorder(None, 0, "normal", calls),
        CallRecorder(12, -1, "early", calls),
    ]
    Trainer(model, config, [*callbacks, every(12, lambda info: {"eval/x": 1.0})]).train(buffer, total_steps=12)
    begins = [(name, "begin", 0, {}) for name in ("early", "normal", "late")]
    evals = [(name, "eval", 12, {"eval/x": 1.0}) for name in ("early", "normal", "late")]
    assert calls == [
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


def test_callbacks_are_closed_after_an_error_too(buffer, config, model):
    recorder = CallRecorder(1)

    def fail(info):
        raise KeyError("failed")

    with pytest.raises(KeyError) as caught:
        Trainer(model, config, [recorder, (3, fail)]).train(buffer)
    assert "fail.on_step at step 3" in caught.value.__notes__[0]
    assert recorder.calls[-1] == ("", "close")
    assert ("", "end", 3) not in recorder.calls


def test_the_model_holds_the_newest_weights_when_a_callback_fails(buffer, config, model):
    def fail(info):
        if info.step == 3:
            raise KeyError("failed")

    trainer = Trainer(model, config, [(3, fail)])
    with pytest.raises(KeyError):
        trainer.train(buffer)
    again = ToyWorldModel(ToyConfig())
    Trainer(again, config, []).train(buffer, total_steps=3)
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
    assert int(trainer.train(buffer, total_steps=5).step) == 5


def test_raising_stop_training_stops_after_all_callbacks_have_run(buffer, config, model):
    recorder = CallRecorder(5)

    def stop(info):
        raise StopTraining("far enough")

    trainer = Trainer(model, config, [(5, stop), recorder])
    trainer.train(buffer)
    assert trainer.step == 5
    name = "test_raising_stop_training_stops_after_all_callbacks_have_run.<locals>.stop"
    assert trainer.stop_reason == f"{name}: far enough"
    assert ("", "step", 5) in recorder.calls
    assert ("", "end", 5) in recorder.calls
    trainer.train(buffer, total_steps=6)
    assert trainer.step == 6


def test_callbacks_receive_copies_that_stay_valid(buffer, config, model):
    kept = []

    def keep(info):
        kept.append((info, info.params(), info.model(), info.read_state()))
        info.params()["dynamics"]["kernel"][:] = np.nan

    Trainer(model, config, [(10, keep)]).train(buffer)
    (early, params, copied, state), _ = kept
    again = ToyWorldModel(ToyConfig())
    Trainer(again, config, []).train(buffer, total_steps=10)
    jax.tree.map(np.testing.assert_array_equal, params, again.params)
    jax.tree.map(np.testing.assert_array_equal, copied.params, again.params)
    jax.tree.map(np.testing.assert_array_equal, state.params, again.params)
    assert int(state.step) == 10
    assert early.metrics["loss"] > 0  # metrics of step 10, although read later
    assert early.lr == pytest.approx(0.01)
    with pytest.raises(RuntimeError, match="state of step 10 is no longer available"):
        early.params()
    with pytest.raises(AttributeError):
        early.step = 3


def test_metrics_read_later_are_those_of_their_step(buffer, config, model):
    infos, means = [], []
    Trainer(
        model, config, [(3, lambda info: infos.append(info)), (3, lambda info: means.append(dict(info.means)))]
    ).train(buffer)
    assert [dict(info.means) for info in infos] == means


def test_objects_that_are_not_callbacks_are_refused(model, config):
    for wrong in (3, CallRecorder, (print, 3), "log"):
        with pytest.raises(TypeError):
            Trainer(model, config, [wrong])


def test_invalid_results_of_callbacks_are_refused(model, config, buffer):
    with pytest.raises(TypeError, match="returned True"):
        Trainer(model, config, [(1, lambda info: True)]).train(buffer)


def test_sources_that_do_not_fit_are_refused_before_training(model, config):
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


def stored_memory(buffer):
    """The latent "memory" of all rows, [rows, 1]."""
    return buffer.take(np.arange(len(buffer))[:, None], latents=True)["context"]["memory"][:, 0]


def buffer_with_latents():
    return fill(ReplayBuffer(10_000, latents={"memory": (1,)}), episodes=2, steps=6)


@pytest.mark.parametrize("capacity", [1, 3])
def test_latents_are_written_back_in_a_fixed_order(config, tmp_path, capacity):
    """The toy model's memory is the row's observation + the memory of the window's first row.

    A batch sees the latents of all groups of K updates but its own and the one before, whatever callbacks do.
    """
    trained, expected = buffer_with_latents(), buffer_with_latents()
    callbacks = [CheckpointCallback(str(tmp_path), save_every=5), (7, lambda info: print(info.replay_size))]
    Trainer(ToyWorldModel(ToyConfig(latents=True)), config.replace(updates_per_call=capacity), callbacks).train(trained)

    pending = []
    for step in range(20):
        while pending and pending[0][0] // capacity <= step // capacity - 2:
            _, batch = pending.pop(0)
            memory = batch["obs"][..., :1] + batch["context"]["memory"][:, None]
            expected.write_latents(batch["row_ids"], {"memory": memory})
        pending.append((step, expected.sample(4, 6, seed=config.seed, update=step, latents=True)))
    assert np.abs(stored_memory(trained)).max() > 1
    np.testing.assert_allclose(stored_memory(trained), stored_memory(expected), rtol=1e-6)


@pytest.mark.parametrize(("saved", "resumed", "in_effect"), [(3, 1, 1), (3, 6, 3), (4, 6, 2), (1, 4, 1)])
def test_a_run_keeps_the_groups_of_its_latents_whatever_a_call_does_later(
    config, tmp_path, caplog, saved, resumed, in_effect
):
    """They decide what batches see, and so what the latents become."""

    def train(folder, capacity, buffer, **options):
        callbacks = [CheckpointCallback(str(tmp_path / folder), save_every=5)]
        trainer = Trainer(ToyWorldModel(ToyConfig(latents=True)), config.replace(updates_per_call=capacity), callbacks)
        trainer.train(buffer, **options)
        return trainer

    whole, other, parts = (buffer_with_latents() for _ in range(3))
    train("whole", saved, whole)
    train("other", resumed, other)
    assert not np.array_equal(stored_memory(whole), stored_memory(other)), "the groups do not matter here"
    train("parts", saved, parts, total_steps=10)
    trainer = train("parts", resumed, parts, resume=True)
    np.testing.assert_array_equal(stored_memory(whole), stored_memory(parts))
    assert trainer.run.capacity == in_effect
    said = f"A call does {in_effect} in place of {resumed} updates (updates_per_call)"
    assert (said in caplog.text) == (in_effect != resumed)
    # What is saved from here on belongs to the same groups.
    again = buffer_with_latents()
    for path in (tmp_path / "parts").glob("*"):
        if path.name.isdigit() and int(path.name) > 15:
            shutil.rmtree(path)
    train("parts", saved, again, resume=tmp_path / "parts" / "15")
    np.testing.assert_array_equal(stored_memory(whole), stored_memory(again))


def test_a_resumed_run_with_latents_equals_an_uninterrupted_one(config, tmp_path):
    """The resumed run has the buffer of the first part, with the latents written to it."""

    def trainer(folder):
        callbacks = [CheckpointCallback(str(tmp_path / folder), save_every=5)]
        return Trainer(ToyWorldModel(ToyConfig(latents=True)), config, callbacks)

    whole_buffer, resumed_buffer = buffer_with_latents(), buffer_with_latents()
    state = trainer("whole").train(whole_buffer)
    trainer("resumed").train(resumed_buffer, total_steps=10)
    resumed = trainer("resumed").train(resumed_buffer, resume=True)
    np.testing.assert_array_equal(stored_memory(whole_buffer), stored_memory(resumed_buffer))
    jax.tree.map(np.testing.assert_array_equal, state.params, resumed.params)


def test_without_stored_latents_windows_have_no_context_row(config, buffer):
    requests = []

    class RecordingBuffer(ReplayBuffer):
        def sample(self, batch_size, sequence_length, *, latents, **options):
            requests.append((sequence_length, latents))
            batch = super().sample(batch_size, sequence_length, **options)
            return batch | {"context": {"memory": np.zeros((batch_size, 1), np.float32)}}

    Trainer(ToyWorldModel(ToyConfig(latents=True)), config, []).train(fill(RecordingBuffer(999)), total_steps=2)
    assert set(requests) == {(5, False)}


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
                raise OSError("disk failure")
            return buffer.sample(*args, update=update, **options)

    trainer = Trainer(model, config, [])
    with pytest.raises(OSError, match="disk failure"):
        trainer.train(Breaking())
    assert trainer.step == 7


def test_trainers_in_two_threads_do_not_affect_each_other(buffer, config):
    alone = [ToyWorldModel(ToyConfig()) for _ in range(2)]
    together = [ToyWorldModel(ToyConfig()) for _ in range(2)]
    seeds = [config.replace(seed=seed) for seed in (1, 2)]
    for model, seeded in zip(alone, seeds, strict=True):
        Trainer(model, seeded, []).train(buffer)
    thread = threading.Thread(target=lambda: Trainer(together[0], seeds[0], []).train(buffer))
    thread.start()
    Trainer(together[1], seeds[1], []).train(buffer)
    thread.join()
    for expected, model in zip(alone, together, strict=True):
        jax.tree.map(np.testing.assert_array_equal, expected.params, model.params)


def test_public_names():
    assert sorted(worldloom.training.__all__) == sorted(
        [
            *("ReplayBuffer", "RunFolder", "TrainState", "Trainer", "TrainingConfig"),
            *("collect", "evaluate", "evaluate_tasks", "offline_then_online", "play", "protocol", "recipe"),
            *("train", "train_many"),
            *("StepInfo", "StopTraining", *(name for name in callbacks.__all__ if name.endswith("Callback"))),
        ]
    )
    for name in worldloom.training.__all__:
        assert callable(getattr(worldloom.training, name))
