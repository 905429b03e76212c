"""Several independent copies of one network, evaluated together."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from worldloom.ops.keys import step_keys


class Ensemble(nnx.Module):
    """``size`` members of the same shape, their parameters stacked on a leading axis.

    Args:
      make: builds one member from its source of initial weights.
      size: number of members, N.
      key: key of the initial weights, one stream per member; the same key gives the same ensemble.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], size: int, *, key: jax.Array):
        graph = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]
        stacked = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(jax.random.split(key, size))
        self.members = nnx.merge(graph, stacked)
        self.size = size

    def __call__(self, x: jax.Array, key: jax.Array | None = None, *, members: jax.Array | None = None) -> jax.Array:
        """Outputs of all members, or of those chosen.

        Args:
          x: [..., in], the same for every member.
          key: turns the members' dropout on, each with its own mask.
          members: [n] indices. Their parameters are gathered first, so the others cost nothing.

        Returns:
          [N or n, ..., out].
        """
        graph, state = nnx.split(self.members)
        if members is not None:
            state = jax.tree.map(lambda leaf: leaf[members], state)
        count = self.size if members is None else members.shape[0]
        # A shared input would be one product of width N·out, whose transposed result every later pass reads with
        # strides: on a CPU a sixth of the gradient's time.
        inputs = jnp.broadcast_to(x, (count, *x.shape))
        return jax.vmap(lambda member, x, key: nnx.merge(graph, member)(x, key))(state, inputs, step_keys(key, count))
