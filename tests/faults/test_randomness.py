"""Concurrent online runs and the program around them do not share random number generators."""

import random
import sys
import threading
from pathlib import Path

import jax
import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))
from toy_family import ToyConfig, ToyWorldModel

from worldloom.envs import make_env
from worldloom.training import Trainer, TrainingConfig
from worldloom.training.callbacks import EvalCallback


def run(seed):
    """60 updates in two environments with evaluation; returns the weights and the replay buffer."""
    with make_env("MountainCarContinuous-v0", 2, seed=seed, time_limit=20) as env, env.another(2, seed + 50) as other:
        shapes = {"obs_shape": env.obs_shape, "action_dim": env.action_dim, "action_type": env.action_type}
        config = TrainingConfig(batch_size=4, sequence_length=4, prefill=30, device="cpu", seed=seed)
        trainer = Trainer(
            ToyWorldModel(ToyConfig(**shapes, latents=True), seed=seed), config, [EvalCallback(other, 20, episodes=2)]
        )
        state = trainer.train(env, total_steps=60)
        rows = trainer.replay.take(np.arange(len(trainer.replay))[:, None], latents=True)
    return jax.device_get((state.params, rows))


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_concurrent_online_runs_end_with_the_same_weights_as_alone():
    alone = [run(seed) for seed in (1, 2, 3)]
    assert not same(alone[0], alone[1])
    together = {}
    threads = [threading.Thread(target=lambda seed=seed: together.update({seed: run(seed)})) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    together[3] = run(3)
    for thread in threads:
        thread.join()
    for number, expected in enumerate(alone, 1):
        assert same(together[number], expected)


def test_the_global_generators_of_the_program_are_not_used():
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].copy(), np.random.get_state()[2]  # noqa: NPY002
    first = run(4)
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert np.random.get_state()[2] == before[2]  # noqa: NPY002
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert same(run(4), first)
