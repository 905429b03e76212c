"""Microbatches and rematerialization give the update of the whole batch, in less memory."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from worldloom import ConfigError, create_world_model
from worldloom.training import TrainingConfig

BATCH, ROWS, OBS, ACTIONS = 8, 12, 5, 3
FAMILIES = {
    "dreamerv3": ("dreamerv3:tiny", {}, ("return_range", {"lo": jnp.float32(-20.0), "hi": jnp.float32(30.0)})),
    "dreamerv3 discrete": (
        "dreamerv3:tiny",
        {"action_type": "discrete"},
        ("return_range", {"lo": jnp.float32(-20.0), "hi": jnp.float32(30.0)}),
    ),
    "tdmpc2": ("tdmpc2:tiny", {"episodic": True}, ("scale", {"value": jnp.float32(40.0)})),
    "tdmpc2 discrete": ("tdmpc2:tiny", {"action_type": "discrete"}, ("scale", {"value": jnp.float32(40.0)})),
}


class Family:
    """One family's model with nonzero heads and a scale far from 1, and a batch with episode ends inside windows."""

    def __init__(self, name):
        preset, fields, (part, statistic) = FAMILIES[name]
        self.model = create_world_model(preset, obs_shape=(OBS,), action_dim=ACTIONS, precision="float32", **fields)
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: x + 0.01 * rng.normal(size=x.shape).astype(np.float32), self.model.params)
        self.model.load_params({**params, part: statistic})
        # Starts of episodes are more frequent in one half of the batch than in the other.
        first = rng.uniform(size=(BATCH, ROWS)) < np.linspace(0.0, 0.4, BATCH)[:, None]
        actions = rng.uniform(-1, 1, (BATCH, ROWS, ACTIONS)).astype(np.float32)
        if "discrete" in name:
            actions = np.eye(ACTIONS, dtype=np.float32)[actions.argmax(-1)]
        self.batch = {
            "obs": rng.normal(size=(BATCH, ROWS, OBS)).astype(np.float32),
            "actions": actions,
            "rewards": 5 * rng.normal(size=(BATCH, ROWS)).astype(np.float32),
            "is_first": first,
            "is_last": np.roll(first, -1, 1),
            "is_terminal": np.roll(first, -1, 1) & (fields.get("episodic", False) or preset.startswith("dreamer")),
        }
        if preset.startswith("dreamer"):
            latents = self.model.algorithm.replay_spec(self.model.config, TrainingConfig()).latents
            self.batch["context"] = {k: np.zeros((BATCH, *shape), np.float32) for k, shape in latents.items()}

    def updated(self, key=None, **fields):
        """State and metrics after one update, and its temporary memory in bytes."""
        algorithm = self.model.algorithm
        training = TrainingConfig(batch_size=BATCH, sequence_length=ROWS - 1, grad_clip=0.0, **fields)
        state = algorithm.init_state(self.model, training, jax.random.key(0))
        update = algorithm.make_update(self.model.config, training, model_class=type(self.model))
        program = jax.jit(update).lower(state, self.batch, key).compile()
        state, metrics = program(state, self.batch, key)
        return state, metrics, program.memory_analysis().temp_size_in_bytes


def by_tensor(model, state):
    """(path, array) of the optimizer's state by tensor; DreamerV3 keeps each moment of all tensors in one vector."""
    trained = {name: part for name, part in state.params.items() if name not in model.untrained}
    vector, unravel = jax.flatten_util.ravel_pytree(trained)
    moments = jax.tree.map(lambda x: unravel(x) if x.shape == vector.shape else x, state.opt_state)
    flat = jax.tree_util.tree_flatten_with_path(moments)[0]
    assert len(flat) > 2 * len(jax.tree.leaves(trained))  # Two moments of each tensor, and counts.
    return flat


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return Family(request.param)


@pytest.fixture(scope="module")
def whole(family):
    return family.updated()


@pytest.mark.parametrize("fields", [{"microbatches": 2}, {"microbatches": 8}, {"remat": True}], ids=str)
def test_the_update_is_the_same(family, whole, fields):
    """Compares the optimizer's second moments: the steps of Adam and LaProp do not depend on the gradients' scale."""
    state, metrics, _ = family.updated(**fields)
    for name, value in whole[1].items():
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5, err_msg=name),
            metrics[name],
            value,
        )
    expected = dict(by_tensor(family.model, whole[0]))
    for path, value in by_tensor(family.model, state):
        largest = np.abs(expected[path]).max()
        # LaProp's first moments are already divided by the root of the second ones, which may be tiny.
        if largest > 1e-12 and ".mu" not in jax.tree_util.keystr(path):
            assert np.abs(value - expected[path]).max() <= 2e-3 * largest, jax.tree_util.keystr(path)
    statistics = [name for name in state.params if name in ("return_range", "scale")]
    for name in statistics:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.params[name], whole[0].params[name]
        )
    assert statistics


def test_microbatches_need_less_memory(family, whole):
    assert family.updated(microbatches=4)[2] < 0.5 * whole[2]


def test_rematerialization_needs_less_memory():
    """With a batch so large that activations dominate."""
    family = Family("dreamerv3")
    family.batch = jax.tree.map(lambda x: np.concatenate([x] * 4), family.batch)
    assert family.updated(remat=True)[2] < 0.9 * family.updated()[2]


def test_each_microbatch_has_its_own_key():
    """For a batch of two equal halves, a shared key would give equal latents."""
    family = Family("dreamerv3")
    family.batch = jax.tree.map(lambda x: np.concatenate([x[: BATCH // 2]] * 2), family.batch)
    replay = family.updated(key=jax.random.key(0), microbatches=2)[1]["replay"]
    first, second = jnp.split(replay["stoch"], 2)
    assert jnp.mean(first != second) > 0.1


def test_microbatches_must_divide_the_batch():
    with pytest.raises(ConfigError, match="microbatches=3 must divide batch_size=16"):
        TrainingConfig(microbatches=3)
