"""The stages of a planner: shift the last mean, roll candidates out, estimate their values, refit to the best."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from worldloom.errors import DataError
from worldloom.ops.keys import split_key
from worldloom.planning.types import Candidates, Distribution, Latent, Step, Transition, Value


def shift(mean: jax.Array, fill: float | jax.Array = 0.0) -> jax.Array:
    """Warm start of the next plan: ``mean`` [H, A] without its first step, and ``fill`` ([] or [A]) as its last."""
    return jnp.concatenate([mean[1:], jnp.full_like(mean[:1], fill)])


def rollout(
    transition: Transition,
    choose: Callable[[int, Latent], jax.Array],
    latents: Latent,
    *,
    horizon: int,
    key: jax.Array | None = None,
    start: Latent | None = None,
) -> Candidates:
    """Roll N candidates out for H steps. The loop over steps is unrolled: meant for horizons of up to some tens.

    Args:
      transition: see :data:`Transition`.
      choose: step t in [0, H) and latents [N, ...] → actions [N, A].
      latents: [N, ...] before the first action.
      horizon: H.
      key: key of the transitions; None takes the mode of their draws.
      start: in place of ``latents`` for the first transition: one latent [...] without the axis N, for transitions
        that broadcast it against the actions. A product with it then costs one row instead of N.

    Raises:
      DataError: ``transition`` returns rewards, discounts or latents of another shape.
    """
    keys = split_key(key, horizon)
    actions = [choose(0, latents)]
    count = actions[0].shape[:-1]
    rewards, discounts, points = [jnp.zeros(count)], [jnp.ones(count)], [latents]
    for t in range(horizon):
        if t:
            actions.append(choose(t, points[t]))
        step = transition(points[t] if t or start is None else start, actions[t], keys[t])
        _check_step(step, latents, count)
        rewards.append(rewards[t] + discounts[t] * step.reward)
        discounts.append(discounts[t] * step.discount)
        points.append(step.latent)
    return Candidates(tuple(actions), tuple(rewards), tuple(discounts), tuple(points))


def bootstrapped_return(value: Value | None, candidates: Candidates, draw: Any) -> jax.Array:
    """Values [N] of candidates: Σ_t d_t·r_t + d_H·V(z_H), where d_t is the product of the discounts before step t.

    Without a ``value`` function it is the sum of rewards.
    """
    if value is None:
        return candidates.rewards[-1]
    return candidates.rewards[-1] + candidates.discounts[-1] * value(candidates.latents[-1], draw)


def refit(
    actions: jax.Array,
    values: jax.Array,
    *,
    num_elites: int,
    temperature: float | jax.Array,
    min_std: float | jax.Array,
    max_std: float | jax.Array,
) -> Distribution:
    """Fit the sampling distribution to the best candidates, weighted by exp(temperature · value).

    Adding a constant to all values changes nothing. With ``temperature`` 0 all elites weigh the same (the
    cross-entropy method).

    Args:
      actions: [H, N, A], without NaN.
      values: [N]. Candidates with NaN are ignored: they have weight 0. Infinities count as the largest finite numbers.
      num_elites: E ≤ N, number of best candidates to fit to.
      temperature: factor on the values in the weights, [].
      min_std: lower bound of the standard deviation, [] or [A].
      max_std: upper bound, [] or [A].

    Returns:
      The distribution. If all values are NaN, it is fitted to E candidates of equal weight.
    """
    values = jnp.where(jnp.isnan(values), -jnp.inf, jnp.nan_to_num(values))
    best, elites = jax.lax.top_k(values, num_elites)
    # Only NaN candidates are at −∞ now. A gap may overflow to −∞, which a temperature of 0 would turn into NaN.
    gaps = jnp.maximum(best - best[0], jnp.finfo(best.dtype).min)
    logits = jnp.where(jnp.isneginf(best) & ~jnp.isneginf(best[0]), -jnp.inf, temperature * gaps)
    weights = jax.nn.softmax(jnp.where(jnp.isneginf(best[0]), 0.0, logits))
    chosen = actions[:, elites]
    # By default GPUs and TPUs multiply matrices in TF32 or bfloat16, which would round the actions.
    weighted = functools.partial(jnp.einsum, "e,hea->ha", weights, precision=jax.lax.Precision.HIGHEST)
    mean = weighted(chosen)
    variance = weighted(jnp.square(chosen - mean[:, None]))
    return Distribution(mean, jnp.clip(jnp.sqrt(variance), min_std, max_std), elites, weights)


def _check_step(step: Step, latents: Latent, count: tuple[int, ...]) -> None:
    """Raise ``DataError`` unless ``step`` is of ``count`` candidates, and of latents shaped as ``latents``."""
    if not isinstance(step, Step):
        raise DataError(
            f"transition returned a {type(step).__name__}; it must return worldloom.planning.Step(latent, reward, "
            "discount)."
        )
    for name, shapes in (("reward", (count,)), ("discount", (count, ()))):
        shape = jnp.shape(getattr(step, name))
        if shape not in shapes:
            raise DataError(
                f"transition returned a {name} of shape {shape}; for {count[0]} candidates it must be "
                f"{' or '.join(map(str, shapes))}."
            )
    given, returned = jax.tree.map(jnp.shape, latents), jax.tree.map(jnp.shape, step.latent)
    if given != returned:
        raise DataError(
            f"transition returned a latent of shapes {returned} for one of shapes {given}; they must be the same."
        )
