"""Regression as classification over symexp-spaced bins (DreamerV3, "Robust predictions"; ``symexp_twohot``).

The bins are in the units of the data: targets are not squashed. (TD-MPC2's two-hot is linear in symlog space.)
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
    """Expected value [...] of logits [..., K], in the units of the data: ``Σ_j b_j (p_j − p_{−j})``."""
    # Summed over mirrored pairs of bins: in float32, a plain sum over bins up to ±4.9e8 would not give 0 for uniform
    # logits, and heads that start at 0 must predict exactly 0.
    centre = logits.shape[-1] // 2
    probs = jax.nn.softmax(logits.astype(jnp.float32))
    pairs = probs[..., centre + 1 :] - probs[..., :centre][..., ::-1]
    return jnp.sum(pairs * symexp_bins(logits.shape[-1])[centre + 1 :], -1)


def symexp_twohot_loss(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Cross entropy [...] between the two-hot code of ``target`` [...] and logits [..., K].

    The code puts all weight on the two bins next to the target, more on the nearer one, so that its mean is the
    target; beyond the ends it saturates on the end bin. NaN gives NaN. No gradient reaches the target.
    """
    code = _two_hot(jax.lax.stop_gradient(target.astype(jnp.float32)), logits.shape[-1])
    logits = logits.astype(jnp.float32)
    return jax.nn.logsumexp(logits, -1) - jnp.sum(code * logits, -1)


def _two_hot(target: jax.Array, num: int) -> jax.Array:
    """[...] → weights [..., K] that sum to 1."""
    bins = symexp_bins(num)
    # The bins on either side of the target.
    count = jnp.searchsorted(bins, target, side="right")
    below, above = jnp.clip(count - 1, 0, num - 1), jnp.clip(count, 0, num - 1)
    # Beyond an end both are the end bin: any two distances give weights that sum to 1 on it.
    to_below = jnp.where(below == above, 1.0, jnp.abs(bins[below] - target))
    to_above = jnp.where(below == above, 1.0, jnp.abs(bins[above] - target))
    # NaN would be found behind the last bin, as the largest target that there is.
    weight = jnp.where(jnp.isnan(target), jnp.nan, to_above / (to_below + to_above))[..., None]
    return weight * jax.nn.one_hot(below, num) + (1 - weight) * jax.nn.one_hot(above, num)
