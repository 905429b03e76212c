"""Evaluates a model during training, on held-out episodes or in separate environments."""

from __future__ import annotations

import logging
from typing import Any

from worldloom.config import as_integer
from worldloom.envs import VectorEnv
from worldloom.errors import ConfigError
from worldloom.training.callbacks.base import Callback, CallbackResult, StepInfo
from worldloom.training.collector import check_env_fits
from worldloom.training.config import TrainingConfig
from worldloom.training.evaluation import evaluate, measure_returns
from worldloom.training.sampler import SequenceSampler

_log = logging.getLogger("worldloom")

_MAX_EVAL_ENVS = 10
"""Maximum number of environments that the evaluation of online training steps together."""


class EvalCallback(Callback):
    """Evaluates the current weights, on data or in environments.

    * A ``ReplayBuffer`` of held-out episodes: publishes the mean loss terms ``eval/loss`` and ``eval/loss/<term>``.
    * A ``VectorEnv``: plays whole episodes with the evaluation policy and publishes ``eval/return`` (the mean),
      ``eval/return_std`` and ``eval/length``, see :func:`worldloom.training.evaluation.measure_returns`. The episodes
      are determined by ``seed`` and the step.

    Args:
      source: held-out episodes, such as the second part of ``ReplayBuffer.split``, or environments used for nothing
        else, such as ``env.another(10, seed=1)``.
      every: steps between two evaluations; None follows ``TrainingConfig.eval_interval``.
      batches: number of batches per evaluation, the same ones every time.
      episodes: number of episodes per evaluation; None follows ``TrainingConfig.eval_episodes``.
      seed: determines the batches or episodes.
    """

    order = -1
    measures = True

    def __init__(
        self, source: Any, every: int | None = None, *, batches: int = 8, episodes: int | None = None, seed: int = 0
    ):
        every = None if every is None else as_integer("every", every)
        batches = as_integer("batches", batches)
        episodes = None if episodes is None else as_integer("episodes", episodes)
        self.source, self.every, self.batches, self.episodes, self.seed = source, every, batches, episodes, seed

    def interval(self, config: TrainingConfig) -> int:
        """``every``, or ``config.eval_interval`` if that is None."""
        return config.eval_interval if self.every is None else self.every

    def on_train_begin(self, info: StepInfo) -> CallbackResult:
        """Refuse data or environments that do not fit, before training instead of at the first evaluation."""
        if not self.interval(info.config):
            return None
        if isinstance(self.source, VectorEnv):
            check_env_fits(self.source, info.model())
        else:
            SequenceSampler(self.source, info.model(), info.config).sample(self.seed, 0)
        return None

    def on_step(self, info: StepInfo) -> CallbackResult:
        """Evaluate and publish the results."""
        model = info.model()
        if isinstance(self.source, VectorEnv):
            seed = self.seed + info.step
            return measure_returns(model, self.source, info.config, episodes=self.episodes, seed=seed)
        terms = evaluate(model, self.source, info.config, batches=self.batches, seed=self.seed)
        return {f"eval/loss/{name}" if name != "loss" else "eval/loss": value for name, value in terms.items()}


def default_evaluation(env: VectorEnv, episodes: int) -> list[EvalCallback]:
    """The default evaluation of an online run: ``episodes`` in separate environments made like ``env``.

    Empty, with a warning, if such environments cannot be made.
    """
    try:
        eval_env = env.another(min(episodes, _MAX_EVAL_ENVS), env.seed + 1)
    except ConfigError as error:
        _log.warning("There will be no evaluation: %s", error)
        return []
    return [EvalCallback(eval_env, seed=env.seed + 1)]
