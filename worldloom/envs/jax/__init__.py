"""Environments in JAX: pure functions of one environment, stepped by the host or within one compiled program.

``make_env("jax:Pendulum-v1")`` makes them like any other environment; ``Trainer.train`` runs whole on the device there.
"""

from worldloom.envs.jax.adapters import adapt
from worldloom.envs.jax.catch import Catch
from worldloom.envs.jax.classic import Acrobot, CartPole, MountainCarContinuous, Pendulum
from worldloom.envs.jax.make import make_jax_env
from worldloom.envs.jax.protocol import JaxEnv, check_jax_env

__all__ = [
    "Acrobot",
    "CartPole",
    "Catch",
    "JaxEnv",
    "MountainCarContinuous",
    "Pendulum",
    "adapt",
    "check_jax_env",
    "make_jax_env",
]
