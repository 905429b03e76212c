"""The distributions of DreamerV3 as small pytrees, in float32. Without a key, samples are modes.

Their counterparts in danijar/dreamerv3 are ``OneHot``, ``Categorical``, ``Normal``, ``Binary`` and ``MSE`` of
``embodied/jax/outs.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from worldloom.ops.keys import split_key
from worldloom.ops.symlog import symlog


class OneHot(NamedTuple):
    """Independent categorical variables as one-hot vectors.

    Attributes:
      log_probs: normalised log-probabilities [..., S, C] of S variables with C classes.
      probs: the probabilities [..., S, C] themselves, so that sampling needs no exponentials.
    """

    log_probs: jax.Array
    probs: jax.Array

    @classmethod
    def from_logits(cls, logits: jax.Array, unimix: float = 0.0) -> OneHot:
        """``p = (1 − unimix) · softmax(logits) + unimix / C``: no class ever has less than ``unimix / C``."""
        # A softmax with the classes on the leading axis, reduced one class at a time: XLA on CPUs is slow at
        # reductions over the short last axis (4 to 32 classes).
        classes = jnp.moveaxis(logits.astype(jnp.float32), -1, 0)
        classes -= jax.lax.stop_gradient(functools.reduce(jnp.maximum, list(classes)))
        masses = jnp.exp(classes)
        total = functools.reduce(jnp.add, list(masses))
        if not unimix:
            log_probs, probs = classes - jnp.log(total), masses / total
        else:
            probs = masses * ((1 - unimix) / total) + unimix / len(classes)
            log_probs = jnp.log(probs)
        return cls(jnp.moveaxis(log_probs, 0, -1), jnp.moveaxis(probs, 0, -1))

    def sample_straight_through(self, uniform: jax.Array | None) -> jax.Array:
        """Exact one-hot samples [..., S, C] whose gradient is that of the probabilities (straight-through).

        The gradient estimator is that of Bengio et al. 2013, as in DreamerV2 and V3.

        Args:
          uniform: independent uniforms from [0, 1), one per variable, [..., S]; None takes the modes.
        """
        probs = self.probs
        if uniform is None:
            index = jnp.argmax(self.log_probs, -1)
        else:
            # Inverse transform: the index is the number of cumulated probabilities not above the uniform. It needs
            # one random number per variable; Gumbel noise needs one, and two logarithms, per class (12 times the
            # time on a CPU). The last class gets the remainder, so rounding of the sum cannot leave the range.
            index, cumulated = jnp.zeros(uniform.shape, jnp.int32), jnp.zeros_like(uniform)
            for mass in jnp.moveaxis(probs, -1, 0)[:-1]:
                cumulated += mass
                index += cumulated <= uniform
        hard = jax.nn.one_hot(index, probs.shape[-1], dtype=jnp.float32)
        # The brackets matter: (hard + p) − p would leave a rounding error in a value that must be exactly 0 or 1.
        return jax.lax.stop_gradient(hard) + (probs - jax.lax.stop_gradient(probs))

    def entropy(self) -> jax.Array:
        """``−Σ_c p log p`` in nats, summed over the S variables: [...]."""
        return -jnp.sum(self.probs * self.log_probs, (-2, -1))

    def kl(self, other: OneHot) -> jax.Array:
        """``KL(self ‖ other)`` in nats, summed over the S variables: [...]."""
        return jnp.sum(self.probs * (self.log_probs - other.log_probs), (-2, -1))


class Categorical(NamedTuple):
    """A discrete action; values are integer indices.

    Attributes:
      log_probs: normalised log-probabilities [..., A].
    """

    log_probs: jax.Array

    @classmethod
    def from_logits(cls, logits: jax.Array) -> Categorical:
        """Plain softmax (DreamerV3's actor mixes in no uniform part)."""
        return cls(jax.nn.log_softmax(logits.astype(jnp.float32)))

    def sample(self, key: jax.Array | None) -> jax.Array:
        """Indices int32 [...]; the most probable one without a key."""
        if key is None:
            return jnp.argmax(self.log_probs, -1).astype(jnp.int32)
        return jax.random.categorical(key, self.log_probs).astype(jnp.int32)

    def log_prob(self, index: jax.Array) -> jax.Array:
        """Log-probability [...] of indices [...]."""
        return jnp.take_along_axis(self.log_probs, index[..., None], -1)[..., 0]

    def entropy(self) -> jax.Array:
        """``−Σ p log p`` in nats: [...]."""
        return -jnp.sum(jnp.exp(self.log_probs) * self.log_probs, -1)


class Normal(NamedTuple):
    """A continuous action with independent entries; samples are *not* clipped or squashed.

    Attributes:
      mean: [..., A].
      std: [..., A], positive.
    """

    mean: jax.Array
    std: jax.Array

    @classmethod
    def bounded(cls, mean: jax.Array, std: jax.Array, min_std: float = 0.1, max_std: float = 1.0) -> Normal:
        """DreamerV3's ``bounded_normal`` from raw outputs: tanh(mean), (max − min) · σ(std + 2) + min."""
        mean, std = mean.astype(jnp.float32), std.astype(jnp.float32)
        return cls(jnp.tanh(mean), (max_std - min_std) * jax.nn.sigmoid(std + 2.0) + min_std)

    def sample(self, key: jax.Array | None) -> jax.Array:
        """Samples [..., A]; the mean without a key."""
        return self.mean if key is None else self.mean + self.std * jax.random.normal(key, self.mean.shape)

    def log_prob(self, value: jax.Array) -> jax.Array:
        """Log-density [...] of values [..., A], summed over the entries."""
        z = (value - self.mean) / self.std
        return jnp.sum(-0.5 * z * z - jnp.log(self.std) - 0.5 * math.log(2 * math.pi), -1)

    def entropy(self) -> jax.Array:
        """``Σ ½ log(2πe σ²)`` in nats: [...]."""
        return jnp.sum(jnp.log(self.std) + 0.5 * math.log(2 * math.pi * math.e), -1)


def sample_actions(policy: Mapping[str, Normal | Categorical], key: jax.Array | None) -> dict[str, jax.Array]:
    """One sample of each action by name, int32 [...] or float32 [..., A]; the modes without a key."""
    keys = split_key(key, len(policy)) if len(policy) > 1 else (key,)
    return {name: policy[name].sample(k) for name, k in zip(policy, keys, strict=True)}


def binary_cross_entropy(logit: jax.Array, target: jax.Array) -> jax.Array:
    """``−y log σ(l) − (1 − y) log σ(−l)``, elementwise, for targets y anywhere in [0, 1]."""
    return -(target * jax.nn.log_sigmoid(logit) + (1 - target) * jax.nn.log_sigmoid(-logit))


def symlog_squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """``Σ (ŷ − symlog(x))²`` over the last axis: ŷ predicts in symlog space; no ½, no mean."""
    return jnp.sum(jnp.square(prediction - symlog(target.astype(jnp.float32))), -1)
