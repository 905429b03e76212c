"""Measure on held-out data, or in environments of their own, while training."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from worldloom.config import check
from worldloom.envs import VectorEnv
from worldloom.errors import ConfigError
from worldloom.training.callbacks.base import Callback, CallbackResult, StepInfo
from worldloom.training.collector import check_env_fits
from worldloom.training.config import TrainingConfig
from worldloom.training.evaluation import evaluate, play
from worldloom.training.sampler import SequenceSampler

_log = logging.getLogger("worldloom")

_EPISODES = 10
"""Episodes of the evaluation that is added by default."""


class EvalCallback(Callback):
    """Evaluates the weights of a step, on data or in environments.

    * A ``ReplayBuffer`` of held-out episodes: publishes the mean loss terms ``eval/loss`` and ``eval/loss/<term>``.
    * A ``VectorEnv``: plays whole episodes with the evaluation policy and publishes ``eval/return`` (their mean),
      ``eval/return_std`` and ``eval/length``. Which episodes is a function of ``seed`` and the step alone.

    Args:
      source: held-out episodes, such as the second part of ``ReplayBuffer.split``, or environments that nobody else
        steps, such as ``env.another(10, seed=1)``.
      every: steps between two evaluations; None follows ``TrainingConfig.eval_interval``.
      batches: batches an evaluation averages over, the same ones every time.
      episodes: episodes an evaluation plays.
      seed: which ones.
    """

    order = -1
    measures = True

    def __init__(self, source: Any, every: int | None = None, *, batches: int = 8, episodes: int = 10, seed: int = 0):
        check(every is None or (isinstance(every, int) and every >= 1), f"every must be an integer ≥ 1, not {every!r}.")
        check(isinstance(batches, int) and batches >= 1, f"batches must be an integer ≥ 1, not {batches!r}.")
        check(isinstance(episodes, int) and episodes >= 1, f"episodes must be an integer ≥ 1, not {episodes!r}.")
        self.source, self.every, self.batches, self.episodes, self.seed = source, every, batches, episodes, seed

    def interval(self, config: TrainingConfig) -> int:
        """``every``, or ``config.eval_interval``."""
        return config.eval_interval if self.every is None else self.every

    def on_train_begin(self, info: StepInfo) -> CallbackResult:
        """Refuse data or environments that do not fit before training, not at the first evaluation."""
        if not self.interval(info.config):
            return None
        if isinstance(self.source, VectorEnv):
            check_env_fits(self.source, info.model())
        else:
            SequenceSampler(self.source, info.model(), info.config).sample(self.seed, 0)
        return None

    def on_step(self, info: StepInfo) -> CallbackResult:
        """Evaluate the weights of this step."""
        model = info.model()
        if isinstance(self.source, VectorEnv):
            ends = play(model, self.source, episodes=self.episodes, seed=self.seed + info.step)
            returns = np.array([end.episode_return for end in ends])
            return {
                "eval/return": float(returns.mean()),
                "eval/return_std": float(returns.std()),
                "eval/length": float(np.mean([end.length for end in ends])),
            }
        terms = evaluate(model, self.source, info.config, batches=self.batches, seed=self.seed)
        return {f"eval/loss/{name}" if name != "loss" else "eval/loss": value for name, value in terms.items()}


def default_evaluation(env: VectorEnv) -> list[EvalCallback]:
    """The evaluation of an online run without callbacks of its own: ten episodes in other environments of the kind.

    Empty, with a warning, if no others can be made.
    """
    try:
        other = env.another(_EPISODES, env.seed + 1)
    except ConfigError as error:
        _log.warning("There will be no evaluation: %s", error)
        return []
    return [EvalCallback(other, episodes=_EPISODES, seed=env.seed + 1)]
