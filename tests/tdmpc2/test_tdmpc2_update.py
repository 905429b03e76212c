"""The update: what it changes and what it must not, in every variant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tdmpc2_variants import VARIANTS, make, observations, random_batch, tasks

from worldloom.models.tdmpc2 import LOSS_TERMS, act, init_state, initial_carry, update
from worldloom.models.tdmpc2.networks import project_rows
from worldloom.training.config import TrainingConfig

# Compiling is all the time these tests take.
QUICK = {"xla_backend_optimization_level": 0}
step = jax.jit(update, compiler_options=QUICK)


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_change_every_part_and_stay_finite(variant):
    model = make(variant)
    state = init_state(model, TrainingConfig(grad_clip=20.0), jax.random.key(0))
    before = state.params
    for n in range(3):
        state, metrics = step(state, random_batch(model.config, seed=n), jax.random.key(n))
    assert int(state.step) == 3
    assert set(LOSS_TERMS) <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    assert jax.tree.structure(before) == jax.tree.structure(state.params)
    for name, part in state.params.items():
        moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before[name], part)
        assert any(jax.tree.leaves(moved)) or name == "scale", name
    carry = initial_carry(model.config, 4)
    carry, action = act(state, carry, observations(model.config, 4), jax.random.key(0), **tasks(model.config, 4))
    assert np.isfinite(action).all()


def test_long_task_embeddings_are_shrunk_where_used_and_written_back():
    table = jnp.array([[3.0, 4.0], [0.3, 0.4], [6.0, 8.0]])
    projected = project_rows(table, jnp.array([0, 1, 0]))
    np.testing.assert_allclose(projected, [[0.6, 0.8], [0.3, 0.4], [6.0, 8.0]], rtol=1e-6)
    model = make("multitask", tau=0.02)  # not the shared one: its weights change
    params = model.params
    params["task_embedding"]["table"] = 10.0 * jnp.ones((3, 4))
    model.load_params(params)
    np.testing.assert_allclose(jnp.linalg.norm(model.task_embedding(jnp.arange(3)), axis=-1), 1.0, rtol=1e-6)
    state = init_state(model, TrainingConfig(learning_rate=1e-6), jax.random.key(0))
    batch = random_batch(model.config) | {"task": np.array([0, 1, 0, 1])}
    after, _ = step(state, batch, jax.random.key(0))
    norms = jnp.linalg.norm(after.params["task_embedding"]["table"], axis=-1)
    np.testing.assert_allclose(norms, [1.0, 1.0, 20.0], rtol=1e-4)
