"""Every field of ``TrainingConfig`` has its documented effect, with both built-in families."""

import jax
import numpy as np
import pytest

from worldloom import ConfigError, DeviceError, DreamerV3Config, DreamerV3WorldModel, TDMPC2Config, TDMPC2WorldModel
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer, TrainingConfig
from worldloom.training.callbacks import CheckpointCallback

OBS, ACTIONS, STEPS = 3, 2, 12


def dreamer():
    return DreamerV3WorldModel(DreamerV3Config.from_size("tiny", obs_shape=(OBS,), action_dim=ACTIONS))


def tdmpc2():
    return TDMPC2WorldModel(TDMPC2Config.from_size("tiny", obs_shape=(OBS,), action_dim=ACTIONS, episodic=True))


FAMILIES = [pytest.param(dreamer, id="dreamerv3"), pytest.param(tdmpc2, id="tdmpc2")]


def fill(buffer):
    rng = np.random.default_rng(0)
    for _ in range(5):
        obs = rng.normal(size=(STEPS + 1, OBS)).astype(np.float32)
        actions = rng.uniform(-1, 1, (STEPS, ACTIONS)).astype(np.float32)
        buffer.add_episode(obs, actions, rng.normal(size=STEPS).astype(np.float32), np.arange(STEPS) == STEPS - 1)
    return buffer


@pytest.fixture(scope="module")
def episodes():
    return fill(ReplayBuffer(1000))


def train(make, episodes, config, callbacks=()):
    model = make()
    before = jax.device_get(model.params)
    trainer = Trainer(model, config, list(callbacks))
    trainer.train(episodes)
    return before, jax.device_get(model.params), trainer


def by_path(params):
    return dict(jax.tree_util.tree_flatten_with_path(params)[0])


def moved(before, after):
    return max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


BASE = TrainingConfig(
    total_steps=3, batch_size=4, sequence_length=5, device="cpu", learning_rate=0.02, warmup_steps=4, grad_clip=0.0
)


@pytest.fixture(scope="module", params=FAMILIES)
def make(request):
    return request.param


@pytest.fixture
def variants(make, request):
    """For tests that compile a variant of the update; DreamerV3's, which are larger, only run with ``-m slow``."""
    if make is dreamer and "slow" not in request.config.getoption("-m").replace("not slow", ""):
        pytest.skip("compiles a variant of DreamerV3's update; run with -m slow")


@pytest.fixture(scope="module")
def base(make, episodes):
    """Weights before and after the base run, its trainer, and metrics and weights of each step."""
    steps = []
    record = (1, lambda info: steps.append((dict(info.metrics), info.params())))
    before, after, trainer = train(make, episodes, BASE, [record])
    return before, after, trainer, steps


def trained_parts(model, params):
    return {name: part for name, part in params.items() if name not in model.untrained}


def test_learning_rate_rises_over_the_warmup(base):
    """It rises over 4 updates from 0; the first update, at rate 0, changes no weight."""
    before, _, trainer, steps = base
    np.testing.assert_allclose([metrics["lr"] for metrics, _ in steps], [0.0, 0.005, 0.01], rtol=1e-6)
    first, second = (trained_parts(trainer.model, params) for _, params in steps[:2])
    assert moved(trained_parts(trainer.model, before), first) == 0.0
    assert moved(first, second) > 0.0


@pytest.mark.usefixtures("variants")
def test_weight_decay_shrinks_kernels_only(make, base, episodes):
    """After two updates, the first of which has rate 0, decay adds − rate · weight_decay · kernel to kernels only."""
    before, _, trainer, steps = base
    _, decayed, _ = train(make, episodes, BASE.replace(total_steps=2, weight_decay=0.1))
    start, plain, shrunk = by_path(before), by_path(steps[1][1]), by_path(decayed)
    encoder_scale = getattr(trainer.model.config, "encoder_lr_scale", 1.0)
    kernels = 0
    for path, value in start.items():
        part, last = path[0].key, path[-1].key
        if part in trainer.model.untrained:
            continue
        kernels += last == "kernel"
        rate = 0.005 * (encoder_scale if part == "encoder" else 1.0) * (last == "kernel")
        # TD-MPC2's policy is trained against the updated Q networks, so its gradient differs a little too.
        tolerance = 2e-3 if part == "policy" else 2e-6
        np.testing.assert_allclose(shrunk[path] - plain[path], -rate * 0.1 * value, atol=tolerance)
    assert kernels > 5


@pytest.mark.usefixtures("variants")
def test_grad_clip_bounds_the_gradient(make, base, episodes):
    """Adam and LaProp ignore a constant scale of gradients, but a bound below all norms scales each one differently."""
    _, off, _, steps = base
    bound = min(metrics["grad_norm"] for metrics, _ in steps) / 10
    _, tight, _ = train(make, episodes, BASE.replace(grad_clip=bound))
    assert moved(off, tight) > 1e-3


@pytest.mark.slow
def test_grad_clip_zero_turns_clipping_off(make, base, episodes):
    _, off, _, _ = base
    _, loose, _ = train(make, episodes, BASE.replace(grad_clip=1e6))
    # Rounding differs between the two programs, and Adam divides by roots of small numbers.
    assert moved(off, loose) < 1e-4


def test_seed_determines_batches_and_sampling(make, base, episodes):
    _, after, trainer, _ = base
    _, same_seed, _ = train(make, episodes, BASE)
    _, other_seed, _ = train(make, episodes, BASE.replace(seed=43))
    assert moved(after, same_seed) == 0.0
    assert moved(after, other_seed) > 0.0
    beyond_32_bits = Trainer(make(), BASE.replace(seed=42 + 2**40), [])
    assert not np.array_equal(jax.random.key_data(beyond_32_bits.state.key), jax.random.key_data(trainer.state.key))


class RecordingBuffer(ReplayBuffer):
    """Records the last requested batch size and sequence length."""

    def sample(self, batch_size, sequence_length, **options):
        self.requested = batch_size, sequence_length
        return super().sample(batch_size, sequence_length, **options)


def test_total_steps_batch_size_and_sequence_length_are_respected(make):
    buffer = fill(RecordingBuffer(1000))
    _, _, trainer = train(make, buffer, BASE)
    assert int(trainer.state.step) == trainer.step == BASE.total_steps
    assert buffer.requested == (BASE.batch_size, BASE.sequence_length)


def test_weights_are_on_the_device_and_an_unknown_device_is_refused(base):
    *_, trainer, _ = base
    assert {leaf.device for leaf in jax.tree.leaves(trainer.state.params)} == {jax.devices("cpu")[0]}
    with pytest.raises(DeviceError, match="cpu:7"):
        Trainer(trainer.model, BASE.replace(device="cpu:7"))


@pytest.mark.usefixtures("variants")
def test_updates_per_call_does_not_change_the_weights(make, base, episodes):
    _, single, _, _ = base
    _, several, _ = train(make, episodes, BASE.replace(updates_per_call=3))
    assert moved(single, several) == 0.0


def test_a_resumed_run_and_a_saved_model_equal_the_base_run_bit_for_bit(make, base, episodes, tmp_path):
    _, whole, trainer, _ = base
    train(make, episodes, BASE.replace(total_steps=2), [CheckpointCallback(str(tmp_path))])
    model = make()
    again = Trainer(model, BASE, [CheckpointCallback(str(tmp_path))])
    again.train(episodes, resume=True)
    assert moved(whole, jax.device_get(model.params)) == 0.0
    assert moved(trainer.state.opt_state, again.state.opt_state) == 0.0
    reloaded = type(model).from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert moved(whole, jax.device_get(reloaded.params)) == 0.0


def test_evaluation_returns_the_loss_terms_of_the_family(base, episodes):
    *_, trainer, _ = base
    terms = trainer.evaluate(episodes, batches=1)
    assert set(terms) <= set(trainer.model.algorithm.loss_terms)
    assert all(np.isfinite(value) for value in terms.values())


@pytest.mark.parametrize(
    "change",
    [
        {"total_steps": 0},
        {"batch_size": 1.5},
        {"learning_rate": 0.0},
        {"weight_decay": -1.0},
        {"grad_clip": float("nan")},
        {"warmup_steps": -1},
        {"eval_interval": True},
        {"device": "abacus"},
        {"seed": -1},
        {"updates_per_call": -1},
        {"skip_nonfinite": 1},
        {"microbatches": 0},
        {"remat": "yes"},
        {"replay_storage": "moon"},
    ],
)
def test_values_out_of_range_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        TrainingConfig(**change)
