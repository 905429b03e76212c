"""Exploration by disagreement: networks predict the next latent, and where they differ there is something to learn.

The intrinsic reward of Plan2Explore (Sekar et al. 2020), for any world model with latents. A transition that was seen
often is predicted alike by all networks, one that was never seen by each in its own way. Unlike there, the spread is
divided by its average over replay, and an ordinary transition is worth 0: so the weight has the same meaning in every
environment, and longer episodes are not worth more by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from worldloom.config import check
from worldloom.models.base import Statistic
from worldloom.nn.ensemble import Ensemble
from worldloom.nn.normed import NormedMLP

_SCALE_RATE = 0.01
"""Rate of the running average of the spread."""


def check_explore_fields(cls: Any, given: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` if a new config of ``cls`` is given fields that matter only with ``explore``, without it.

    Not for configs that are read: files of earlier versions may hold such values.
    """
    if given.get("explore", "none") != "none":
        return
    for name in ("explore_weight", "explore_updates", "explore_heads"):
        usual = cls.__dataclass_fields__[name].default
        check(
            given.get(name, usual) == usual,
            f"{name}={given.get(name)!r} has no effect without explore='disagreement' (--explore disagreement).",
        )


class Disagreement(nnx.Module):
    """An ensemble that predicts the next latent, with the weight of its reward.

    Args:
      inputs: width of a latent and an action side by side.
      outputs: width of the latent that is predicted.
      width: of the one hidden layer.
      heads: number of networks, at least 2.
      weight: of the reward at the start; :func:`advance` lets it decay.
      dtype: of matrix products.
      rngs: source of the initial weights.
    """

    def __init__(
        self, inputs: int, outputs: int, *, width: int, heads: int, weight: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        network = lambda rngs: NormedMLP(inputs, [width], outputs, dtype=dtype, rngs=rngs)  # noqa: E731
        self.networks = Ensemble(network, heads, key=rngs.params())
        self.weight = Statistic(jnp.asarray(weight, jnp.float32))
        # 0 until the first update: then there is no reward.
        self.scale = Statistic(jnp.zeros(()))

    def errors(self, x: jax.Array, following: jax.Array) -> jax.Array:
        """The loss [...]: squared error of the next latent [..., out] from latent and action [..., in], mean of all."""
        x, following = jax.lax.stop_gradient((x, following))
        return jnp.square(self.networks(x) - following).sum(-1).mean(0)

    def spread(self, x: jax.Array) -> jax.Array:
        """Standard deviation [...] between the networks' predictions from latent and action [..., in]."""
        return jax.lax.stop_gradient(jnp.sqrt(jnp.var(self.networks(x), axis=0).sum(-1)))

    def reward(self, x: jax.Array) -> jax.Array:
        """The intrinsic reward [...] of an action at a latent [..., in]: weight · (spread / average spread − 1)."""
        scale = self.scale[...]
        relative = self.spread(x) / jnp.where(scale > 0, scale, 1.0) - 1.0
        return jax.lax.stop_gradient(jnp.where(scale > 0, self.weight[...] * relative, 0.0))


def advance(part: Mapping[str, Any], spread: jax.Array, *, weight: float, updates: int) -> dict[str, Any]:
    """The weights of a :class:`Disagreement` after an update: the reward's weight falls linearly to 0.

    Args:
      part: its weights, nested.
      spread: mean spread of the update's batch, [].
      weight: of the reward at the start.
      updates: number of updates after which it is 0.
    """
    scale = part["scale"]
    moved = jnp.where(scale > 0, scale + _SCALE_RATE * (spread - scale), spread)
    return {**part, "scale": moved, "weight": jnp.maximum(part["weight"] - weight / updates, 0.0)}
