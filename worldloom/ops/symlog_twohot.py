"""Scalars as a categorical over equal bins in symlog space: rewards and values of TD-MPC2.

Reference: ``two_hot``, ``two_hot_inv`` and ``soft_ce`` of ``common/math.py``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from worldloom.ops.symlog import symexp, symlog


def two_hot(x: jax.Array, *, num_bins: int, vmin: float, vmax: float) -> jax.Array:
    """Distribute each scalar over the two bins next to its symlog, so that their weighted mean is that symlog.

    With q = (clip(symlog(x), vmin, vmax) − vmin) / binwidth, bin k gets max(0, 1 − \\|q − k\\|).

    Args:
      x: [...] scalars in the units of the data.
      num_bins: K, at least 2.
      vmin: position of the first bin in symlog space; smaller values are clipped to it.
      vmax: position of the last bin, above ``vmin``; larger values are clipped to it.

    Returns:
      [..., K] weights, at most two of them above 0, with sum 1.
    """
    position = (jnp.clip(symlog(x), vmin, vmax) - vmin) / ((vmax - vmin) / (num_bins - 1))
    return jnp.maximum(0.0, 1.0 - jnp.abs(position[..., None] - jnp.arange(num_bins, dtype=position.dtype)))


def decode(logits: jax.Array, *, vmin: float, vmax: float) -> jax.Array:
    """symexp(Σ_k softmax(logits)_k · bin_k): [..., K] → [...] in the units of the data."""
    bins = jnp.linspace(vmin, vmax, logits.shape[-1], dtype=logits.dtype)
    return symexp(jnp.sum(jax.nn.softmax(logits, axis=-1) * bins, axis=-1))


def cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """−Σ_k target_k · log softmax(logits)_k: [..., K] and [..., K] → [...]; leading axes broadcast."""
    return -jnp.sum(target * jax.nn.log_softmax(logits, axis=-1), axis=-1)
