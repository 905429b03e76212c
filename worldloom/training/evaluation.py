"""How good a model is: loss terms on held-out data, returns of whole episodes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from worldloom.config import check
from worldloom.envs import EpisodeEnd, VectorEnv
from worldloom.state import TrainState
from worldloom.training.collect import acting, check_match
from worldloom.training.config import TrainingConfig
from worldloom.training.feed import Windows
from worldloom.training.host import root_key


def evaluate(
    model: Any, buffer: Any, config: TrainingConfig | None = None, *, batches: int = 8, seed: int = 0, **overrides: Any
) -> dict[str, float]:
    """Mean loss terms of ``model`` over windows of held-out data, every draw at its mode.

    The same arguments give the same windows and the same numbers. Compiled once per model config and batch shape.

    Args:
      model: a world model; it is not changed.
      buffer: the data, a ``ReplayBuffer``.
      config: batch size and sequence length; None takes the defaults of ``TrainingConfig``.
      batches: batches to average over.
      seed: which windows.
      **overrides: fields of ``config`` to change.

    Returns:
      ``{"loss": …, …}`` with the family's loss terms.

    Raises:
      DataError: the buffer is empty, has other shapes, or no episode is as long as a window.
    """
    config = (config or TrainingConfig()).replace(**overrides)
    check(isinstance(batches, int) and batches >= 1, f"batches must be an integer ≥ 1, not {batches!r}.")
    windows = Windows(buffer, model, config)
    # Started one after another and fetched together: the device need not wait for the host in between.
    terms = [model.compute_loss(windows.draw(seed, number)[0], key=None) for number in range(batches)]
    fetched = jax.device_get(terms)
    return {name: float(np.mean([batch[name] for batch in fetched], dtype=np.float64)) for name in fetched[0]}


def play(
    model: Any,
    env: VectorEnv,
    *,
    episodes: int = 10,
    seed: int = 0,
    explore: bool = False,
    frames: list[np.ndarray] | None = None,
) -> list[EpisodeEnd]:
    """Play whole episodes and return how each ended.

    Every environment plays the same number of episodes (the first ones one more where that does not divide): taking
    those that end first instead would favour short episodes. The same arguments give the same episodes.

    Args:
      model: a world model with the environment's shapes.
      env: the environments; they are reset with ``seed``, and left amid an episode.
      episodes: how many.
      seed: of environments, latents and actions.
      explore: act as when collecting data, not as in evaluation.
      frames: a list to which pictures of environment 0 are appended, one an observation of its first episode; ``env``
        must have been made with ``render=True``.

    Raises:
      ConfigError: the environment and the model do not fit, or the environment renders no picture.
      EnvError: an environment crashed; its episode counts for nothing.
    """
    check(isinstance(episodes, int) and episodes >= 1, f"episodes must be an integer ≥ 1, not {episodes!r}.")
    check_match(env, model)
    algorithm = model.algorithm
    act = acting(algorithm.act if explore else algorithm.act_in_evaluation)
    state = TrainState(jnp.int32(0), model.params, None, root_key(seed), model.config, None)
    carry = algorithm.initial_carry(model.config, env.num_envs)
    missing = np.full(env.num_envs, episodes // env.num_envs)
    missing[: episodes % env.num_envs] += 1
    ends: list[EpisodeEnd] = []
    rows, number, filming = env.reset(seed=seed), 0, frames is not None
    while missing.any():
        if filming and frames is not None:
            frames.append(env.render())
            filming = not rows.is_last[0]
        carry, actions, _ = act(state, carry, rows.obs, rows.is_first, number)
        rows, number = env.step(jax.device_get(actions)), number + 1
        for event in rows.events:
            if isinstance(event, EpisodeEnd) and not event.crashed and missing[event.env]:
                missing[event.env] -= 1
                ends.append(event)
    return ends
