"""Both families learn in worlds whose optimum is known: by termination, by truncation, from a picture and a vector."""

import functools

import numpy as np
import pytest
from tiny_envs import Corridor, Lamp, Steady

from worldloom.envs import make_env
from worldloom.models.dreamer import DreamerV3Config, DreamerV3WorldModel
from worldloom.models.tdmpc2 import TDMPC2Config, TDMPC2WorldModel
from worldloom.training import Trainer, TrainingConfig
from worldloom.training.evaluation import play


def shapes(env):
    return {"obs_shape": env.obs_shape, "action_dim": env.action_dim, "action_type": env.action_type}


def dreamer(env, **fields):
    """A DreamerV3 of a few thousand weights."""
    sizes = {"deter_dim": 32, "stoch_dim": 32, "num_categories": 8, "hidden_dim": 32, "mlp_layers": 1, "blocks": 4}
    dreams = {"imagination_starts": 4, "imagination_horizon": 5, "return_horizon": 20.0, "bins": 41}
    return DreamerV3WorldModel(DreamerV3Config(**shapes(env), **{**sizes, **dreams, **fields}))


def tdmpc2(env, **fields):
    """Likewise a TD-MPC2, whose planner looks at few sequences."""
    sizes = {"latent_dim": 16, "hidden_dim": 32, "encoder_dim": 32, "num_q": 2, "num_bins": 21, "dropout": 0.0}
    plans = {"num_samples": 32, "num_elites": 6, "num_pi_trajs": 6, "iterations": 3}
    bins = {"vmin": -3.0, "vmax": 3.0, "episode_length": env.episode_length or 20}
    return TDMPC2WorldModel(TDMPC2Config(**shapes(env), **{**sizes, **plans, **bins, **fields}))


def learned(make_model, world, steps, image_size=None, **settings):
    """Mean return of 20 episodes after ``steps`` updates, the median of three seeds: returns come and go."""
    returns = []
    for seed in range(3):
        config = TrainingConfig(device="cpu", seed=seed, prefill=200, batch_size=16, grad_clip=0.0, **settings)
        with make_env(world, 4, seed=seed, image_size=image_size) as env:
            model = make_model(env)
            Trainer(model, config, []).train(env, total_steps=steps)
            with env.another(10, seed=100 + seed) as other:
                returns.append(np.mean([end.episode_return for end in play(model, other, episodes=20, seed=seed)]))
    return float(np.median(returns))


pytestmark = pytest.mark.slow
DREAMS = {"sequence_length": 8, "learning_rate": 2e-3, "warmup_steps": 50}
PLANS = {"sequence_length": 4, "learning_rate": 3e-4}


def test_dreamer_learns_where_episodes_terminate():
    """Best 0.5."""
    assert learned(dreamer, Corridor, 500, train_ratio=64.0, **DREAMS) >= 0.475


def test_dreamer_learns_where_episodes_are_truncated():
    """Best 10, of which a policy that never draws less widely than σ = 0.1 can have 9.6."""
    assert learned(dreamer, Steady, 3000, train_ratio=64.0, **DREAMS) >= 9.0


def test_dreamer_learns_from_a_picture_and_a_vector():
    """Best 1, or ¾ with either of them alone."""
    model = functools.partial(dreamer, cnn_depth=4, entropy_scale=3e-3)
    slower = {**DREAMS, "sequence_length": 4, "learning_rate": 1e-3}
    assert learned(model, Lamp, 500, image_size=48, train_ratio=32.0, **slower) >= 0.9


def test_tdmpc2_learns_where_episodes_are_truncated():
    """Best 10."""
    assert learned(tdmpc2, Steady, 1000, **PLANS) >= 9.5


def test_tdmpc2_learns_where_episodes_terminate():
    """Best 0.5."""
    assert learned(functools.partial(tdmpc2, episodic=True), Corridor, 1000, **PLANS) >= 0.475
