"""Replay on the host and on the device give bit-identical weights, latents, checkpoints and resumed runs."""

import os

import jax
import numpy as np
import pytest
from online_worlds import Glide
from toy_family import ToyConfig, ToyWorldModel, fill
from trees import assert_same

from worldloom import create_world_model
from worldloom.envs import make_env
from worldloom.errors import ConfigError
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer
from worldloom.training.callbacks import CheckpointCallback
from worldloom.training.config import TrainingConfig


def weights(trainer):
    return jax.device_get((trainer.state.params, trainer.state.opt_state))


def latents(buffer):
    ids = np.arange(*buffer.state_dict().values())[:, None]
    return buffer.take(ids, latents=True)["context"]


def offline(config, storage, capacity, **options):
    buffer = fill(ReplayBuffer(1000))
    buffer.ensure_latents({"memory": (1,)})
    config = config.replace(replay_storage=storage, updates_per_call=capacity)
    trainer = Trainer(ToyWorldModel(ToyConfig(latents=True)), config, options.pop("callbacks", []))
    trainer.train(buffer, **options)
    return trainer, buffer


@pytest.mark.parametrize("capacity", [1, 3])
def test_offline_training_does_not_depend_on_the_storage(config, capacity):
    (host, host_buffer), (device, device_buffer) = (offline(config, each, capacity) for each in ("host", "device"))
    assert_same(weights(host), weights(device))
    assert_same(latents(host_buffer), latents(device_buffer))
    assert np.any(latents(device_buffer)["memory"] != 0)


def test_checkpoints_can_be_resumed_with_the_other_storage(config, tmp_path):
    whole, whole_buffer = offline(config, "host", 2)
    half = config.total_steps // 2
    offline(config, "device", 2, callbacks=[CheckpointCallback(str(tmp_path))], total_steps=half)
    for storage in ("host", "device"):
        resumed, buffer = offline(
            config, storage, 2, callbacks=[CheckpointCallback(str(tmp_path))], resume=tmp_path / str(half)
        )
        assert_same(weights(whole), weights(resumed))
        assert_same(latents(whole_buffer), latents(buffer))


@pytest.mark.parametrize("capacity", [1, 4])
def test_online_training_in_a_buffer_that_evicts_rows_does_not_depend_on_the_storage(config, capacity):
    trainers = []
    for storage in ("host", "device"):
        env = make_env(Glide, 2, seed=3)
        online = config.replace(replay_storage=storage, updates_per_call=capacity, prefill=20, replay_capacity=60)
        model = ToyWorldModel(
            ToyConfig(obs_shape=env.obs_shape, action_dim=env.action_dim, action_type=env.action_type, latents=True)
        )
        trainers.append(Trainer(model, online, []))
        trainers[-1].train(env, total_steps=100)
    host, device = trainers
    assert_same(weights(host), weights(device))
    assert len(host.replay) == 60
    assert_same(latents(host.replay), latents(device.replay))


@pytest.mark.skipif(
    os.environ.get("WORLDLOOM_TEST_OPTIMIZED") != "1",
    reason="the tests' quick code generator rounds two programs differently; CI runs this with XLA's usual one",
)
@pytest.mark.parametrize(
    ("name", "obs_shape"), [("dreamerv3:tiny", (5,)), ("tdmpc2:tiny", (5,)), ("dreamerv3:tiny", (48, 48, 3))]
)
def test_training_of_either_family_does_not_depend_on_the_storage(name, obs_shape):
    rng, results = np.random.default_rng(0), []
    image = len(obs_shape) == 3
    data = [
        (
            rng.integers(0, 256, (13, *obs_shape)).astype(np.uint8) if image else rng.normal(size=(13, *obs_shape)),
            rng.uniform(-1, 1, (12, 2)),
            rng.normal(size=12),
        )
        for _ in range(4)
    ]
    for storage in ("host", "device"):
        buffer = ReplayBuffer(1000)
        for obs, actions, rewards in data:
            buffer.add_episode(obs, actions, rewards, truncated=True)
        config = TrainingConfig(
            total_steps=3, batch_size=2, sequence_length=4, device="cpu", updates_per_call=2, replay_storage=storage
        )
        trainer = Trainer(create_world_model(name, obs_shape=obs_shape, action_dim=2, device="cpu"), config, [])
        trainer.train(buffer)
        results.append(weights(trainer))
    assert_same(*results)


def test_the_copy_on_the_device_grows_while_training(config):
    """It is allocated for the rows that the buffer holds when training starts."""

    def trained(storage):
        buffer = fill(ReplayBuffer(10_000))
        grow = (4, lambda info: fill(buffer) and None)
        trainer = Trainer(
            ToyWorldModel(ToyConfig()), config.replace(replay_storage=storage, updates_per_call=2), [grow]
        )
        trainer.train(buffer)
        return trainer, buffer

    trainer, buffer = trained("device")
    assert len(buffer) > 2 * len(fill(ReplayBuffer(1000)))
    assert np.all([np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights(trainer))])


def test_auto_means_the_host_on_a_cpu_and_other_buffers_refuse_the_device(config, buffer):
    class OverridingBuffer(ReplayBuffer):
        def sample(self, *args, **kwargs):
            self.sampled = True
            return super().sample(*args, **kwargs)

    overriding = fill(OverridingBuffer(1000))
    Trainer(ToyWorldModel(ToyConfig()), config, []).train(overriding)
    assert overriding.sampled
    with pytest.raises(ConfigError, match="a OverridingBuffer stays on the host"):
        Trainer(ToyWorldModel(ToyConfig()), config.replace(replay_storage="device"), []).train(overriding)
