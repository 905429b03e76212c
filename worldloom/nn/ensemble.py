"""Several independent copies of one network, evaluated together."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from worldloom.ops.keys import step_keys


class Ensemble(nnx.Module):
    """``size`` networks of the same shape, parameters stacked on a leading axis (reference: ``layers.Ensemble``).

    Args:
      make: builds one member from a source of initial weights; the member maps (x [..., in], key) to [..., out].
      size: number of members, N.
      key: key of the initial weights, split over the members; the same key gives the same ensemble.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], size: int, *, key: jax.Array):
        graph = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]
        stacked = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(jax.random.split(key, size))
        self.members = nnx.merge(graph, stacked)
        self.size = size

    def __call__(self, x: jax.Array, key: jax.Array | None = None, *, members: jax.Array | None = None) -> jax.Array:
        """Outputs of all members, or of the chosen ones.

        Args:
          x: [..., in], the same for every member.
          key: turns the members' dropout on, each with its own mask; None leaves it off.
          members: [n] indices, or None for all. Their parameters are gathered first; the others are not evaluated.

        Returns:
          [N or n, ..., out].
        """
        graph, state = nnx.split(self.members)
        if members is not None:
            state = jax.tree.map(lambda leaf: leaf[members], state)
        count = self.size if members is None else members.shape[0]
        # With an unbatched input XLA computes one product of width N·out and transposes the result, which every later
        # pass then reads with strides: on a CPU a sixth of the gradient's time.
        inputs = jnp.broadcast_to(x, (count, *x.shape))
        return jax.vmap(lambda member, x, key: nnx.merge(graph, member)(x, key))(state, inputs, step_keys(key, count))
