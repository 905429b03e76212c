"""Small models of every variant, and data for them."""

import functools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from worldloom.models.tdmpc2 import TDMPC2Config, TDMPC2WorldModel

SMALL = {
    "encoder_dim": 16, "hidden_dim": 16, "latent_dim": 16, "num_q": 3, "num_samples": 16, "num_elites": 4,
    "num_pi_trajs": 4, "iterations": 2, "precision": "float32", "mlp_layers": 1, "horizon": 2,
}  # fmt: skip
VARIANTS = {
    "vector": {},
    "episodic": {"episodic": True},
    "discrete": {"action_type": "discrete", "action_dim": 3},
    "multitask": {"num_tasks": 3, "task_dim": 4, "action_dims": (2, 1, 2), "episode_lengths": (500, 100, 250)},
    "image": {"obs_shape": (3, 64, 64), "latent_dim": 512},
    "joint": {"obs_shape": {"pos": (3,), "cam": (7, 7, 3), "vel": (2,)}},
}


@functools.cache
def make(variant="vector", **fields):
    return TDMPC2WorldModel(
        TDMPC2Config(**{"obs_shape": (5,), "action_dim": 2, **SMALL, **VARIANTS[variant], **fields})
    )


def observations(config, *lead, seed=0):
    draw = np.random.default_rng(seed)

    def each(shape):
        if len(shape) == 3:
            return draw.integers(0, 256, size=(*lead, *shape)).astype(np.uint8)
        return draw.normal(size=(*lead, *shape)).astype(np.float32)

    shapes = config.obs_shape
    return {name: each(s) for name, s in shapes.items()} if isinstance(shapes, Mapping) else each(shapes)


def random_batch(config, size=4, rows=6, seed=0):
    draw = np.random.default_rng(seed)
    discrete = config.action_type == "discrete"
    batch = {
        "obs": observations(config, size, rows, seed=seed),
        "actions": draw.integers(0, config.action_dim, size=(size, rows))
        if discrete
        else draw.uniform(-1, 1, size=(size, rows, config.action_dim)).astype(np.float32),
        "rewards": draw.normal(size=(size, rows)).astype(np.float32),
        "is_terminal": np.zeros((size, rows), bool),
    }
    batch["is_terminal"][0, -1] = config.episodic
    return batch | ({"task": np.arange(size) % config.num_tasks} if config.multitask else {})


def tasks(config, size):
    return {"task": jnp.arange(size) % config.num_tasks} if config.multitask else {}
