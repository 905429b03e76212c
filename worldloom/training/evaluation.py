"""Evaluation of a model: loss terms on held-out data, returns of whole episodes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from worldloom.config import check
from worldloom.envs import EpisodeEnd, VectorEnv
from worldloom.training.collector import check_env_fits, compiled_policy
from worldloom.training.config import TrainingConfig
from worldloom.training.run_info import root_key
from worldloom.training.sampler import SequenceSampler


def evaluate(
    model: Any, buffer: Any, config: TrainingConfig | None = None, *, batches: int = 8, seed: int = 0, **overrides: Any
) -> dict[str, float]:
    """Mean loss terms of ``model`` over windows of held-out data, with the mode in place of every random draw.

    The same arguments give the same windows and the same numbers. Compiled once per model config and batch shape.

    Args:
      model: a world model; it is not changed.
      buffer: the data, a ``ReplayBuffer``.
      config: batch size and sequence length; None means the defaults of ``TrainingConfig``.
      batches: number of batches to average over.
      seed: determines the windows.
      **overrides: fields of ``config`` to change.

    Returns:
      ``{"loss": …, …}`` with the family's loss terms.

    Raises:
      DataError: the buffer is empty, has other shapes, or no episode is as long as a window.
    """
    config = (config or TrainingConfig()).replace(**overrides)
    check(isinstance(batches, int) and batches >= 1, f"batches must be an integer ≥ 1, not {batches!r}.")
    sampler = SequenceSampler(buffer, model, config)
    # Start all batches before fetching any result, so that the device does not wait for the host in between.
    terms = [model.compute_loss(sampler.sample(seed, number)[0], key=None) for number in range(batches)]
    fetched = jax.device_get(terms)
    return {name: float(np.mean([batch[name] for batch in fetched], dtype=np.float64)) for name in fetched[0]}


def play(
    model: Any,
    env: VectorEnv,
    *,
    episodes: int = 10,
    seed: int = 0,
    explore: bool = False,
    greedy: bool = False,
    frames: list[np.ndarray] | None = None,
) -> list[EpisodeEnd]:
    """Play whole episodes with the evaluation policy; returns their returns and lengths as :class:`EpisodeEnd`.

    Every environment plays the same number of episodes (the first ones one more if ``episodes`` is not a multiple):
    counting the episodes that finish first would be biased towards short ones. The same arguments give the same
    episodes.

    Args:
      model: a world model with the environment's shapes.
      env: the environments; they are reset with ``seed``, and may be within an episode afterwards.
      episodes: number of episodes in total.
      seed: seed of environments, latents and actions.
      explore: use the policy that collects data instead of the evaluation policy.
      greedy: let every draw of the policy take its mode.
      frames: list to which images of environment 0 are appended, one per observation of its first episode; requires an
        ``env`` made with ``render=True``.

    Raises:
      ConfigError: the environment and the model do not fit, or the environment renders no image.
      EnvError: an environment crashed; its episode is not counted.
    """
    check(isinstance(episodes, int) and episodes >= 1, f"episodes must be an integer ≥ 1, not {episodes!r}.")
    check_env_fits(env, model)
    algorithm = model.algorithm
    policy = algorithm.policy if explore else algorithm.evaluation_policy
    policy = _greedy(policy) if greedy else policy
    act = compiled_policy(policy, model.__class__, model.config)
    params, key = model.params, root_key(seed)
    carry = algorithm.initial_carry(model.config, env.num_envs)
    # Episodes still to play, by environment.
    remaining = np.full(env.num_envs, episodes // env.num_envs)
    remaining[: episodes % env.num_envs] += 1
    ends: list[EpisodeEnd] = []
    time_step, number, recording = env.reset(seed=seed), 0, frames is not None
    while remaining.any():
        if recording and frames is not None:
            frames.append(env.render())
            recording = not time_step.is_last[0]
        carry, actions, _ = act(params, key, carry, time_step.obs, time_step.is_first, number)
        time_step, number = env.step(jax.device_get(actions)), number + 1
        for event in time_step.events:
            if isinstance(event, EpisodeEnd) and not event.crashed and remaining[event.env]:
                remaining[event.env] -= 1
                ends.append(event)
    return ends


def measure_returns(
    model: Any,
    env: VectorEnv,
    config: TrainingConfig,
    *,
    episodes: int | None = None,
    seed: int = 0,
    frames: list[np.ndarray] | None = None,
    recorder: Callable[[VectorEnv], Any] = lambda env: env,
) -> dict[str, float]:
    """What an evaluation publishes: ``eval/return`` (the mean), ``eval/return_std`` and ``eval/length``.

    ``eval/success`` is added where all episodes report one in their ``info``, and ``eval/greedy_return`` with its
    standard deviation as ``TrainingConfig.eval_greedy`` says.

    Args:
      model: see :func:`play`.
      env: see :func:`play`.
      config: number of episodes and greedy episodes.
      episodes: number of episodes in place of ``config.eval_episodes``.
      seed: see :func:`play`; greedy episodes are those of the same seed.
      frames: see :func:`play`.
      recorder: wraps ``env`` for the first episodes.
    """
    count = config.eval_episodes if episodes is None else episodes
    measured = _summary(play(model, recorder(env), episodes=count, seed=seed, frames=frames))
    greedy = model.algorithm.samples_in_evaluation if config.eval_greedy is None else config.eval_greedy
    if greedy:
        ends = play(model, env, episodes=count, seed=seed, greedy=True)
        measured |= {f"eval/greedy_{name}": value for name, value in _mean_and_std(ends).items()}
    return measured


def _summary(ends: Sequence[EpisodeEnd]) -> dict[str, float]:
    summary = {f"eval/{name}": value for name, value in _mean_and_std(ends).items()}
    summary["eval/length"] = float(np.mean([end.length for end in ends]))
    for name in ("success", "is_success"):
        if all(name in end.info for end in ends):
            summary["eval/success"] = float(np.mean([end.info[name] for end in ends]))
    return summary


def _mean_and_std(ends: Sequence[EpisodeEnd]) -> dict[str, float]:
    returns = np.array([end.episode_return for end in ends])
    return {"return": float(returns.mean()), "return_std": float(returns.std())}


@functools.cache
def _greedy(policy: Any) -> Any:
    """``policy`` without a key, the same function for the same policy."""

    def greedy(model: Any, carry: Any, obs: Any, key: Any, *, is_first: Any = None) -> Any:
        return policy(model, carry, obs, None, is_first=is_first)

    return greedy
