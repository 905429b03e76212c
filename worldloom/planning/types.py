"""What planners take and return. A *latent* is any pytree of arrays; N candidates have it with a leading axis N."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Latent = Any
"""Pytree of arrays: the state that a model predicts from."""


class Step(NamedTuple):
    """What the model predicts for one action of each of N candidates.

    Attributes:
      latent: [N, ...] latents after the action.
      reward: [N] reward of the action.
      discount: [N] or [], factor on everything that follows: γ times the probability that the episode continues.
    """

    latent: Latent
    reward: jax.Array
    discount: jax.Array | float


class Candidates(NamedTuple):
    """N action sequences and what the model predicts for them at H + 1 points: before each action and after the last.

    Attributes:
      actions: H times [N, A].
      rewards: H + 1 times [N], discounted sum of the rewards predicted up to the point.
      discounts: H + 1 times [N], product of the discounts up to the point; 0 where the episode has ended.
      latents: H + 1 times [N, ...].
    """

    actions: tuple[jax.Array, ...]
    rewards: tuple[jax.Array, ...]
    discounts: tuple[jax.Array, ...]
    latents: tuple[Latent, ...]


class Distribution(NamedTuple):
    """Sampling distribution fitted to elites.

    Attributes:
      mean: [H, A].
      std: [H, A] around that mean.
      elites: [E] indices of the candidates it was fitted to, best first.
      weights: [E], sum 1.
    """

    mean: jax.Array
    std: jax.Array
    elites: jax.Array
    weights: jax.Array


class Plan(NamedTuple):
    """Result of a planner.

    Attributes:
      action: [A] to execute now, within the bounds.
      mean: [H, A] of the last distribution, not shifted; ``shift(plan.mean)`` starts the next plan.
      std: [H, A] of the last distribution.
      elite_actions: [E, A] first actions of the last elites, best first.
      elite_values: [E] their values; −∞ if ignored.
      elite_weights: [E] their weights in ``mean``; sum 1.
    """

    action: jax.Array
    mean: jax.Array
    std: jax.Array
    elite_actions: jax.Array
    elite_values: jax.Array
    elite_weights: jax.Array


Transition = Callable[[Latent, jax.Array, jax.Array | None], Step]
"""Latents [N, ...], actions [N, A] and a key → :class:`Step`. Without a key, it takes the mode of its draws."""

Prior = Callable[[Latent, jax.Array | None], jax.Array]
"""Latents [N, ...] and a key → proposed actions [N, A]. Without a key, it takes the mode of its draws."""

Value = Callable[[Latent, Any], jax.Array]
"""Latents [N, ...] and a draw → values [N] of what follows them.

The draw of an iteration is its key, or None; with ``context`` it is the pair (key, row of ``context``).
"""

Estimate = Callable[[Value | None, Candidates, Any], jax.Array]
"""Value function, candidates and draw → values [N] of the candidates; NaN for those to ignore."""
