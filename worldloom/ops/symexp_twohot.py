"""Regression as classification over symexp-spaced bins (DreamerV3, equations 10 and 11).

The bins live in *raw* space: targets are not squashed. (TD-MPC2's two-hot is linear in symlog space.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from worldloom.ops.symlog import symexp


def symexp_bins(num: int = 255) -> jax.Array:
    """``num`` (odd) exactly antisymmetric bins: symexp of equal steps from −20 to 20, 0 in the middle."""
    half = symexp(jnp.linspace(-20.0, 0.0, (num + 1) // 2, dtype=jnp.float32))
    return jnp.concatenate([half, -half[:-1][::-1]])


def symexp_twohot_mean(logits: jax.Array) -> jax.Array:
    """Expected value [...] of logits [..., K].

    ``Σ_j b_j (p_j − p_{−j})`` over mirrored pairs of bins. A plain sum over bins up to ±4.9e8 would not give 0 for
    uniform logits in float32, and heads that start at 0 must predict exactly 0.
    """
    centre = logits.shape[-1] // 2
    probs = jax.nn.softmax(logits.astype(jnp.float32))
    pairs = probs[..., centre + 1 :] - probs[..., :centre][..., ::-1]
    return jnp.sum(pairs * symexp_bins(logits.shape[-1])[centre + 1 :], -1)


def symexp_twohot_loss(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Cross entropy [...] between the two-hot code of ``target`` [...] and logits [..., K].

    The code puts all weight on the two bins next to the target, in proportion to closeness; beyond the ends it
    saturates on the end bin. No gradient reaches the target.
    """
    num = logits.shape[-1]
    logits = logits.astype(jnp.float32)
    target = jax.lax.stop_gradient(target.astype(jnp.float32))
    bins = symexp_bins(num)
    not_above = jnp.sum(bins <= target[..., None], -1)
    below, above = jnp.clip(not_above - 1, 0, num - 1), jnp.clip(not_above, 0, num - 1)
    to_below = jnp.where(below == above, 1.0, jnp.abs(bins[below] - target))
    to_above = jnp.where(below == above, 1.0, jnp.abs(bins[above] - target))
    weight_below = to_above / (to_below + to_above)
    pick = lambda index: jnp.take_along_axis(logits, index[..., None], -1)[..., 0]  # noqa: E731
    chosen = weight_below * pick(below) + (1 - weight_below) * pick(above)
    return jax.nn.logsumexp(logits, -1) - chosen
