"""Collecting without learning."""

from __future__ import annotations

from typing import Any

import jax

from worldloom.config import check, is_integer
from worldloom.envs import VectorEnv, make_env
from worldloom.training.config import TrainingConfig
from worldloom.training.run_state import Run


def collect(
    model: Any, env: Any, env_steps: int, *, replay: Any = None, config: TrainingConfig | None = None, **overrides: Any
) -> Any:
    """Act in environments with the policy that collects, without any update, and return the replay buffer.

    ``Trainer.train(env, replay=collect(model, env, 10_000))`` learns from the rows then. (``train_ratio=0`` does not
    mean no updates, but one per decision step.)

    Args:
      model: a world model, which is not changed.
      env: a :class:`~worldloom.envs.VectorEnv`, which the caller closes, or an argument of ``make_env``.
      env_steps: environment steps to take, counting action repeat, at least 1.
      replay: buffer to collect into; None creates one of ``config.replay_capacity`` rows.
      config: ``seed``, ``replay_capacity`` and ``prefill``, the decision steps for which TD-MPC2 takes random actions
        first; None means the defaults.
      **overrides: fields of ``config`` to change.

    Raises:
      ConfigError: the environment and the model do not fit.
    """
    config = (config or TrainingConfig()).replace(**overrides)
    check(is_integer(env_steps) and env_steps >= 1, f"env_steps must be an integer ≥ 1, not {env_steps!r}.")
    world = env if isinstance(env, VectorEnv) else make_env(env, seed=config.seed)
    try:
        run = Run(model, config)
        run.use_env(world, replay)
        assert run.collector is not None
        with jax.default_device(run.device):
            while run.env_steps < env_steps:
                run.collector.step(run.state)
        return run.collector.replay
    finally:
        if world is not env:
            world.close()
