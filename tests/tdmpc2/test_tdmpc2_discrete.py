"""Discrete actions in a world whose only signal is that episodes end."""

import jax
import jax.numpy as jnp
import numpy as np

from worldloom.models.tdmpc2 import TDMPC2Config, TDMPC2WorldModel, init_state, make_update, replay_spec
from worldloom.replay import ReplayBuffer
from worldloom.training.config import TrainingConfig

PLACES = 7
GAMMA = 0.9


def random_walks(episodes, seed=0):
    """Walks on 0 … 6 from the middle; 0 and 6 are terminal. Every step is rewarded with 1."""
    draw, buffer = np.random.default_rng(seed), ReplayBuffer(10_000)
    for _ in range(episodes):
        places, actions = [PLACES // 2], []
        while 0 < places[-1] < PLACES - 1:
            actions.append(draw.integers(2))
            places.append(places[-1] + 2 * actions[-1] - 1)
        rewards = np.ones(len(actions), np.float32)
        buffer.add_episode(np.eye(PLACES, dtype=np.float32)[places], np.array(actions), rewards, terminated=True)
    return buffer


def test_an_agent_learns_to_stay_alive_from_terminations_alone():
    """The best policy turns around at the edge and lives on: 1 / (1 − γ) = 10. One step over the edge is worth 1."""
    config = TDMPC2Config(
        obs_shape=(PLACES,), action_dim=2, action_type="discrete", episodic=True, discount=GAMMA, tau=0.1, horizon=2,
        latent_dim=16, hidden_dim=32, encoder_dim=32, num_q=2, mlp_layers=1, num_samples=16, num_elites=4,
        num_pi_trajs=4, iterations=2, encoder_lr_scale=1.0, value_coef=1.0, consistency_coef=4.0, entropy_coef=1e-2,
        precision="float32",
    )  # fmt: skip
    training = TrainingConfig(batch_size=32, sequence_length=4, learning_rate=3e-3, grad_clip=20.0)
    model, spec, buffer = TDMPC2WorldModel(config, seed=0), replay_spec(config, training), random_walks(60)
    state = init_state(model, training, jax.random.key(0))
    step = jax.jit(make_update(config, training), donate_argnums=0)
    for number in range(1200):
        batch = buffer.sample(training.batch_size, spec.rows, update=number, cross_episodes=spec.cross_episodes)
        batch.pop("row_ids")
        state, _ = step(state, batch, jax.random.fold_in(state.key, number))
    model.load_params(state.params)

    inner = jnp.eye(PLACES)[1:-1]
    z = model.encode(inner).z
    q = jnp.stack([model.q_values(z, jnp.eye(2)[jnp.full(5, a)], None, jnp.arange(2)).mean(0) for a in (0, 1)], axis=-1)
    assert q[0, 0] < 2.0
    assert q[-1, 1] < 2.0
    assert q.max(-1).min() > 5.0
    probs = model.prior(z, None).probs
    assert probs[0, 1] > 0.9
    assert probs[-1, 0] > 0.9
    _, actions = model.act(None, inner, jax.random.key(0), explore=False)
    assert actions[0] == 1
    assert actions[-1] == 0
