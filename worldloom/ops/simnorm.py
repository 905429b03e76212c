"""Simplicial normalisation."""

import jax


def simnorm(x: jax.Array, group: int) -> jax.Array:
    """Softmax within groups of consecutive features (TD-MPC2, equation 4, with temperature 1; ``layers.SimNorm``).

    Args:
      x: [..., L], where ``group`` divides L.
      group: features per simplex, V in the paper, at least 1.

    Returns:
      [..., L]: L / group simplices side by side, each non-negative with sum 1.
    """
    return jax.nn.softmax(x.reshape(*x.shape[:-1], -1, group), axis=-1).reshape(x.shape)
