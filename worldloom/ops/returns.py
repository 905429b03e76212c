"""λ-returns."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def lambda_return(r_t: jax.Array, discount_t: jax.Array, v_t: jax.Array, lambda_: jax.Array | float) -> jax.Array:
    """``G_{t−1} = r_t + γ_t · [(1 − λ_t) · v_t + λ_t · G_t]`` for t = T … 1, starting from ``G_T = v_T``.

    Everything is time-major and belongs to *arriving* at step t (Sutton & Barto 2018, section 12.1; DreamerV3's
    ``lambda_return``; the paper prints v_t beside r_t, one step off: danijar/dreamerv3#181).

    Args:
      r_t: rewards [T, ...] of steps 1 … T.
      discount_t: γ [T, ...], 0 where the episode ends.
      v_t: values [T, ...] of the states arrived at.
      lambda_: a number, or [T, ...] (0 where a trace must be cut).

    Returns:
      Returns [T, ...] of steps 0 … T − 1.
    """

    def backup(g_t: jax.Array, step: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        r, discount, v, lam = step
        g_tm1 = r + discount * ((1 - lam) * v + lam * g_t)
        return g_tm1, g_tm1

    lambda_t = jnp.broadcast_to(jnp.asarray(lambda_, v_t.dtype), v_t.shape)
    return jax.lax.scan(backup, v_t[-1], (r_t, discount_t, v_t, lambda_t), reverse=True)[1]
