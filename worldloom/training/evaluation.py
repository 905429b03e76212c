"""Evaluation of a model: loss terms on held-out data, returns of whole episodes."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from worldloom.config import as_integer
from worldloom.envs import EpisodeEnd, TimeStep, VectorEnv
from worldloom.envs.make import check_made
from worldloom.training.collector import check_env_fits, compiled_policy
from worldloom.training.config import TrainingConfig
from worldloom.training.interrupts import Interrupted, interrupted
from worldloom.training.on_device.play import is_on_device, steps_on_device
from worldloom.training.run_info import root_key
from worldloom.training.sampler import SequenceSampler

_log = logging.getLogger("worldloom")

_SECONDS_BETWEEN_MESSAGES = 10.0


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
    batches = as_integer("batches", batches)
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
    max_steps: int | None = None,
) -> list[EpisodeEnd]:
    """Play whole episodes with the evaluation policy; returns their returns and lengths as :class:`EpisodeEnd`.

    Every environment plays the same number of episodes (the first ones one more if ``episodes`` is not a multiple):
    counting the episodes that finish first would be biased towards short ones. The same arguments give the same
    episodes. Environments in JAX with a time limit are played in one compiled program, without images, and up to
    rounding like those that are stepped from the host: take as many environments as episodes on a GPU, and a tenth as
    many on a CPU, where an environment that waits for the longest episode costs as much as one that plays. What takes
    longer than ten seconds logs how far it is.

    Args:
      model: a world model with the environment's shapes.
      env: the environments; they are reset with ``seed``, and may be within an episode afterwards.
      episodes: number of episodes in total.
      seed: seed of environments, latents and actions.
      explore: use the policy that collects data instead of the evaluation policy.
      greedy: let every draw of the policy take its mode.
      frames: list to which images of environment 0 are appended, one per observation of its first episode; requires an
        ``env`` made with ``render=True``.
      max_steps: decision steps at which an episode is cut, with a warning; None is the environment's own time limit
        or, without one, the default of ``TrainingConfig.max_episode_steps``.

    Raises:
      ConfigError: the environment and the model do not fit, or the environment renders no image.
      EnvError: an environment crashed; its episode is not counted.
      Interrupted: within a callback, once a signal has asked training to stop.
    """
    episodes = as_integer("episodes", episodes)
    max_steps = None if max_steps is None else as_integer("max_steps", max_steps)
    check_made(env)
    check_env_fits(env, model)
    algorithm = model.algorithm
    policy = algorithm.policy if explore else algorithm.evaluation_policy
    policy = _greedy(policy) if greedy else policy
    act = compiled_policy(policy, model.__class__, model.config)
    params, key = model.params, root_key(seed)
    carry = algorithm.initial_carry(model.config, env.num_envs)
    tally = _Tally(env, episodes, max_steps or env.episode_length or TrainingConfig.max_episode_steps)
    time_step, number, recording = env.reset(seed=seed), 0, frames is not None
    if not recording and tally.never_cuts and is_on_device(env):
        for each in steps_on_device(act, params, key, carry, env, time_step, tally.remaining):
            tally.add(each)
            if interrupted():
                raise Interrupted
        return tally.ends
    while tally.remaining.any():
        if recording and frames is not None:
            frames.append(env.render())
            recording = not time_step.is_last[0]
        if interrupted():
            raise Interrupted
        carry, actions, _ = act(params, key, carry, time_step.obs, time_step.is_first, number)
        time_step, number = env.step(jax.device_get(actions)), number + 1
        tally.add(time_step)
        recording = recording and not tally.cut[0]
        if tally.remaining.any() and tally.all_cut:
            # The environments still to play are all within episodes that were cut: begin the next ones.
            time_step = env.reset()
            tally.clear()
    tally.warn_of_cuts()
    return tally.ends


class _Tally:
    """Counts the episodes of an evaluation.

    Args:
      env: its environments, which are reset next.
      episodes: number of episodes in total.
      limit: decision steps at which an episode is cut.

    Attributes:
      ends: the episodes that ended, or were cut.
      remaining: int [N], episodes still to play, by environment.
      cut: bool [N], environments within an episode that was cut; nothing counts there until they are reset.
    """

    def __init__(self, env: VectorEnv, episodes: int, limit: int):
        self.ends: list[EpisodeEnd] = []
        self.remaining = np.full(env.num_envs, episodes // env.num_envs)
        self.remaining[: episodes % env.num_envs] += 1
        self._episodes, self._limit, self._cuts, self._steps = episodes, limit, 0, 0
        self._bad_steps = 0
        self._said, self._own_limit = time.monotonic(), env.episode_length
        self.clear()

    @property
    def never_cuts(self) -> bool:
        """Whether the environments end all episodes themselves within the limit."""
        return self._own_limit is not None and self._own_limit <= self._limit

    def clear(self) -> None:
        """All environments are reset: all of them begin new episodes."""
        self.cut = np.zeros(len(self.remaining), bool)
        self._lengths, self._returns = np.zeros(len(self.remaining), int), np.zeros(len(self.remaining))

    @property
    def all_cut(self) -> bool:
        """Whether every environment with episodes still to play is within one that was cut."""
        return bool(self.cut[self.remaining > 0].all())

    def add(self, time_step: TimeStep) -> None:
        """Count a step."""
        self._steps += 1
        self._lengths = np.where(time_step.is_first, 0, self._lengths + 1)
        self._returns = np.where(time_step.is_first, 0, self._returns + time_step.reward)
        self.cut &= ~time_step.is_first
        for event in time_step.events:
            if isinstance(event, EpisodeEnd) and not event.crashed and not self.cut[event.env]:
                # Left out, episodes that always meet NaN would keep the evaluation from ever ending.
                self._bad_steps += event.bad_step and bool(self.remaining[event.env])
                self._end(event)
        for env in np.flatnonzero((self._lengths >= self._limit) & ~time_step.is_last & ~self.cut):
            self.cut[env] = True
            if self.remaining[env]:
                self._cuts += 1
                self._end(EpisodeEnd(int(env), float(self._returns[env]), int(self._lengths[env]), False, False))
        if time.monotonic() - self._said > _SECONDS_BETWEEN_MESSAGES:
            self._said = time.monotonic()
            _log.info(
                "Evaluating: %d of %d episodes done, step %d; an episode has at most %d.",
                *(len(self.ends), self._episodes, self._steps, self._limit),
            )

    def warn_of_cuts(self) -> None:
        """Log how many episodes were cut, by the limit or at NaN, if any."""
        if self._cuts:
            _log.warning(
                "%d of %d evaluated episodes did not end and were cut after %d decision steps; max_episode_steps, or a "
                "time_limit of the environment, sets another number.",
                *(self._cuts, len(self.ends), self._limit),
            )
        if self._bad_steps:
            _log.warning(
                "%d of %d evaluated episodes were cut at NaN or infinity, so their returns are incomplete.",
                *(self._bad_steps, len(self.ends)),
            )

    def _end(self, end: EpisodeEnd) -> None:
        if self.remaining[end.env]:
            self.remaining[end.env] -= 1
            self.ends.append(end)


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
      config: number of episodes, greedy episodes, and the limit where the environment has none.
      episodes: number of episodes in place of ``config.eval_episodes``.
      seed: see :func:`play`; greedy episodes are those of the same seed.
      frames: see :func:`play`.
      recorder: wraps ``env`` for the first episodes.
    """
    count = config.eval_episodes if episodes is None else episodes
    limit = env.episode_length or config.max_episode_steps
    measured = _summary(play(model, recorder(env), episodes=count, seed=seed, frames=frames, max_steps=limit))
    greedy = model.algorithm.samples_in_evaluation if config.eval_greedy is None else config.eval_greedy
    if greedy:
        ends = play(model, env, episodes=count, seed=seed, greedy=True, max_steps=limit)
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
