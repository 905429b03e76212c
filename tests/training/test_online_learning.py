"""Both families learn in environments with known optimum: with termination, with truncation, from image and vector."""

import functools

import numpy as np
import pytest
from online_worlds import shapes
from tiny_envs import Corridor, Lamp, Steady

from worldloom.envs import make_env
from worldloom.models.dreamer import DreamerV3Config, DreamerV3WorldModel
from worldloom.models.tdmpc2 import TDMPC2Config, TDMPC2WorldModel
from worldloom.training import Trainer, TrainingConfig
from worldloom.training.evaluation import play


def dreamer(env, **fields):
    """A DreamerV3 of a few thousand weights."""
    sizes = {"deter_dim": 32, "stoch_dim": 32, "num_categories": 8, "hidden_dim": 32, "mlp_layers": 1, "blocks": 4}
    imagination = {"imagination_starts": 4, "imagination_horizon": 5, "return_horizon": 20.0, "bins": 41}
    return DreamerV3WorldModel(DreamerV3Config(**shapes(env), **{**sizes, **imagination, **fields}))


def tdmpc2(env, **fields):
    """A TD-MPC2 of a few thousand weights, whose planner evaluates few action sequences."""
    sizes = {"latent_dim": 16, "hidden_dim": 32, "encoder_dim": 32, "num_q": 2, "num_bins": 21, "dropout": 0.0}
    planner = {"num_samples": 32, "num_elites": 6, "num_pi_trajs": 6, "iterations": 3}
    values = {"vmin": -3.0, "vmax": 3.0, "episode_length": env.episode_length or 20}
    return TDMPC2WorldModel(TDMPC2Config(**shapes(env), **{**sizes, **planner, **values, **fields}))


def learned(make_model, world, steps, image_size=None, **settings):
    """Mean return of 20 episodes after ``steps`` updates; the median of three seeds, because returns fluctuate."""
    returns = []
    for seed in range(3):
        config = TrainingConfig(device="cpu", seed=seed, prefill=200, batch_size=16, grad_clip=0.0, **settings)
        with make_env(world, 4, seed=seed, image_size=image_size) as env:
            model = make_model(env)
            Trainer(model, config, []).train(env, total_steps=steps)
            with env.another(10, seed=100 + seed) as eval_env:
                returns.append(np.mean([end.episode_return for end in play(model, eval_env, episodes=20, seed=seed)]))
    return float(np.median(returns))


pytestmark = pytest.mark.slow
DREAMER = {"sequence_length": 8, "learning_rate": 2e-3, "warmup_steps": 50}
TDMPC2 = {"sequence_length": 4, "learning_rate": 3e-4}


def test_dreamer_learns_where_episodes_terminate():
    """The optimum is 0.5."""
    assert learned(dreamer, Corridor, 500, train_ratio=64.0, **DREAMER) >= 0.475


def test_dreamer_learns_where_episodes_are_truncated():
    """The optimum is 10; a policy whose standard deviation is at least 0.1 can reach 9.6."""
    assert learned(dreamer, Steady, 3000, train_ratio=64.0, **DREAMER) >= 9.0


def test_dreamer_learns_from_an_image_and_a_vector():
    """The optimum is 1, with only one of the observations ¾."""
    model = functools.partial(dreamer, cnn_depth=4, entropy_scale=3e-3)
    slower = {**DREAMER, "sequence_length": 4, "learning_rate": 1e-3}
    assert learned(model, Lamp, 500, image_size=48, train_ratio=32.0, **slower) >= 0.9


def test_tdmpc2_learns_where_episodes_are_truncated():
    """The optimum is 10."""
    assert learned(tdmpc2, Steady, 1000, **TDMPC2) >= 9.5


def test_tdmpc2_learns_where_episodes_terminate():
    """The optimum is 0.5."""
    assert learned(functools.partial(tdmpc2, episodic=True), Corridor, 1000, **TDMPC2) >= 0.475
