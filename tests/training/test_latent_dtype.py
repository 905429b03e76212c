"""Stored latents rounded to bfloat16: the same results wherever replay is kept, half of the memory there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax_worlds import LikeDreamer, LikeTDMPC2, assert_same, content, trained
from toy_family import ToyConfig, ToyWorldModel, fill

from worldloom import create_world_model
from worldloom.errors import ConfigError
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer, TrainingConfig
from worldloom.training.sampler import SequenceSampler
from worldloom.training.update_loop import _with_rounded_latents


def rounded(values):
    return np.asarray(values).astype(jnp.bfloat16).astype(np.float32)


def with_rounded_latents(found):
    """Everything that a run leaves behind, its stored latents as a device would keep them."""
    return found | {"memory": rounded(found["memory"])}


OPTIONS = {"latents": True, "num_envs": 3, "updates_per_call": 2, "replay_capacity": 470, "latent_dtype": "bfloat16"}


@pytest.mark.parametrize(("loop", "storage"), [("host", "device"), ("device", "auto")])
def test_online_results_do_not_depend_on_where_replay_is_kept(loop, storage):
    host = content(trained(LikeDreamer, "host", replay_storage="host", **OPTIONS))
    other = content(trained(LikeDreamer, loop, replay_storage=storage, **OPTIONS))
    assert not np.array_equal(host["memory"], rounded(host["memory"])), "the comparison shows nothing"
    assert_same(with_rounded_latents(host), with_rounded_latents(other))


def test_the_setting_is_read():
    precise = content(trained(LikeDreamer, "host", **OPTIONS | {"latent_dtype": "float32"}))
    coarse = content(trained(LikeDreamer, "host", **OPTIONS))
    assert not np.array_equal(precise["memory"], coarse["memory"])
    np.testing.assert_allclose(coarse["memory"], precise["memory"], rtol=0.02, atol=0.02)


def test_latents_take_half_of_the_memory_of_a_device():
    buffer = fill(ReplayBuffer(1000))
    buffer.ensure_latents({"memory": (1,)})
    taken = {}
    for dtype in ("float32", "bfloat16"):
        config = TrainingConfig(batch_size=2, sequence_length=3, latent_dtype=dtype)
        sampler = SequenceSampler(buffer, ToyWorldModel(ToyConfig(latents=True)), config)
        estimate = sampler.bytes_on_device(growing=True)
        sampler.to_device(jax.devices()[0], growing=True)
        sampler.on_device.copy_new_rows()
        assert sampler.ring["latents/memory"].dtype == dtype
        assert sum(array.nbytes for array in sampler.ring.values()) == estimate
        taken[dtype] = sampler.ring["latents/memory"].nbytes
    assert taken == {"float32": 4000, "bfloat16": 2000}


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False), min_size=1))
def test_an_update_reads_what_a_device_would_have_kept(values):
    latents = np.array(values, np.float32)
    update = jax.jit(_with_rounded_latents(lambda state, batch, key: (state, batch["context"])))
    for kept in (latents, latents.astype(jnp.bfloat16)):
        _, read = update(None, {"context": {"deter": kept}}, None)
        assert read["deter"].dtype == jnp.float32
        np.testing.assert_array_equal(read["deter"], rounded(latents))


def test_losses_and_gradients_of_dreamer_hardly_change():
    """What the documentation says of the option. One-hot draws are exact; the recurrent state is rounded."""
    rng = np.random.default_rng(0)
    model = create_world_model("dreamerv3:tiny", obs_shape=(5,), action_dim=2, device="cpu")
    config = TrainingConfig(batch_size=8, sequence_length=8, device="cpu", total_steps=60)
    buffer = ReplayBuffer(1000)
    buffer.ensure_latents(model.algorithm.replay_spec(model.config, config).latents)
    for _ in range(8):
        obs = np.cumsum(rng.normal(size=(41, 5)), 0)
        buffer.add_episode(obs, rng.uniform(-1, 1, (40, 2)), obs[1:, 0], truncated=True)
    trainer = Trainer(model, config, [])
    state = trainer.train(buffer)
    update = model.algorithm.make_update(model.config, config.of_update(), model_class=type(model))
    programs = [jax.jit(each) for each in (update, _with_rounded_latents(update))]
    ratios = []
    for number in range(100, 110):
        batch, _ = trainer.run.sampler.sample(0, number)
        assert np.abs(batch["context"]["deter"]).max() > 0.1
        precise, coarse = (program(state, batch, jax.random.key(number))[1] for program in programs)
        ratios.append([abs(coarse[name] / precise[name] - 1) for name in ("loss", "grad_norm")])
    loss, gradient = np.mean(ratios, 0)
    assert 0 < loss < 0.001, ratios
    assert 0 < gradient < 0.005, ratios


def test_data_without_latents_are_trained_and_evaluated_on_with_a_word(caplog):
    config = TrainingConfig(latent_dtype="bfloat16", device="cpu", batch_size=2, sequence_length=2, total_steps=1)
    small = {"deter_dim": 16, "stoch_dim": 8, "num_categories": 4, "hidden_dim": 16, "mlp_layers": 1, "blocks": 2}
    model = create_world_model("dreamerv3:tiny", obs_shape=(2,), action_dim=1, device="cpu", **small)
    trainer = Trainer(model, config, [])
    trainer.train(fill(ReplayBuffer(99)))
    assert "latent_dtype='bfloat16' has no effect here: the data store no latents." in caplog.text
    assert np.isfinite(trainer.evaluate(fill(ReplayBuffer(99)), batches=1)["loss"])


def test_a_family_without_latents_refuses_it():
    config = TrainingConfig(latent_dtype="bfloat16", device="cpu", batch_size=2, sequence_length=2, total_steps=1)
    model = create_world_model("tdmpc2:tiny", obs_shape=(2,), action_dim=1, device="cpu")
    with pytest.raises(ConfigError, match="TDMPC2WorldModel stores none; leave it at 'float32'"):
        Trainer(model, config, [])
    with pytest.raises(ConfigError, match="stores none"):
        trained(LikeTDMPC2, "host", latent_dtype="bfloat16")
    with pytest.raises(ConfigError, match="latent_dtype must be 'float32' or 'bfloat16', not 'float16'"):
        TrainingConfig(latent_dtype="float16")
