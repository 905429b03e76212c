"""How candidates are drawn around a mean: Gaussian within bounds, or one categorical per step."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from worldloom.config import check, is_number


class ActionSampler(Protocol):
    """What a planner needs to know of the actions."""

    def noise(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Standard noise [*shape], the input of :meth:`sample`."""

    def sample(self, mean: jax.Array, std: jax.Array, noise: jax.Array) -> jax.Array:
        """Actions [..., A] of the distribution with ``mean`` and ``std``, which broadcast against ``noise``."""

    def mode(self, mean: jax.Array) -> jax.Array:
        """The action [..., A] to execute for a distribution with ``mean`` [..., A]."""

    def clip(self, action: jax.Array) -> jax.Array:
        """``action`` [..., A] within the bounds."""


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianActions:
    """Continuous actions, drawn from a Gaussian and clipped.

    Args:
      low: lower bounds, a number or [A].
      high: upper bounds, a number or [A].

    Raises ``ConfigError`` if ``low`` is not below ``high``; arrays in a trace are not checked.
    """

    low: float | jax.Array = -1.0
    high: float | jax.Array = 1.0

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            if not is_number(bound := getattr(self, name)):
                object.__setattr__(self, name, jnp.asarray(bound, jnp.float32))
        if not any(isinstance(bound, jax.core.Tracer) for bound in (self.low, self.high)):
            below = np.less(self.low, self.high).all()  # NumPy: this module makes one when it is imported
            check(bool(below), f"low={self.low} must be below high={self.high}.")

    def noise(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Standard normal [*shape]."""
        return jax.random.normal(key, shape, jnp.float32)

    def sample(self, mean: jax.Array, std: jax.Array, noise: jax.Array) -> jax.Array:
        """mean + std · noise, clipped: [..., A]."""
        return self.clip(mean + std * noise)

    def mode(self, mean: jax.Array) -> jax.Array:
        """The mean, clipped: [..., A]."""
        return self.clip(mean)

    def clip(self, action: jax.Array) -> jax.Array:
        """[..., A] within [low, high]."""
        return jnp.clip(action, self.low, self.high)


@dataclasses.dataclass(frozen=True)
class CategoricalActions:
    """Discrete actions as one-hots [..., A] (cross-entropy method over categoricals, Rubinstein 1999).

    The elites' weighted mean of one-hots *is* the next categorical. Candidates are drawn with probability ∝
    mean + std: a Gaussian keeps its spread in std, and adding it to the categorical's mean keeps that from collapsing.
    """

    def noise(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Standard Gumbel [*shape]."""
        return jax.random.gumbel(key, shape, jnp.float32)

    def sample(self, mean: jax.Array, std: jax.Array, noise: jax.Array) -> jax.Array:
        """One-hots [..., A] with probability ∝ mean + std (Gumbel-max)."""
        scores = jnp.log(mean + std) + noise
        return jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1])

    def mode(self, mean: jax.Array) -> jax.Array:
        """One-hot of the most probable action, [..., A]."""
        return jax.nn.one_hot(jnp.argmax(mean, axis=-1), mean.shape[-1])

    def clip(self, action: jax.Array) -> jax.Array:
        """One-hots are within their bounds."""
        return action
