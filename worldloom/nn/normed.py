"""Layers of TD-MPC2: affine map, LayerNorm, Mish."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

# The reference truncates at ±2 absolute, 100 standard deviations: in effect not at all.
_kernel_init = nnx.initializers.normal(0.02)


def mish(x: jax.Array) -> jax.Array:
    """x · tanh(log(1 + eˣ)), elementwise (Misra 2019).

    tanh(log(1 + e)) = n / (n + 2) with n = e·(e + 2): one exponential instead of three transcendentals, which on a
    CPU is a quarter of the time. Beyond 20 the factor is 1 in float32 and eˣ must not overflow.
    """
    e = jnp.exp(jnp.minimum(x, 20.0))
    n = e * (e + 2.0)
    return x * (n / (n + 2.0))


class NormedLinear(nnx.Module):
    """activation(LayerNorm(dropout(x·W + b))): the dropout sits before the norm.

    Products are taken in ``dtype``, everything after them in float32.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activation: Callable[[jax.Array], jax.Array] = mish,
        dropout: float = 0.0,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.affine = nnx.Linear(in_features, out_features, kernel_init=_kernel_init, dtype=dtype, rngs=rngs)
        # PyTorch's epsilon; the two-pass variance does not cancel.
        self.norm = nnx.LayerNorm(out_features, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)
        self.activation = activation
        self.dropout = dropout

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[..., in] → [..., out]; a key turns the dropout on."""
        return self.after_affine(self.affine(x), key)

    def after_affine(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Everything behind the affine map, for callers that merge several affine maps into one product."""
        x = x.astype(jnp.float32)
        if self.dropout and key is not None:
            kept = jax.random.bernoulli(key, 1.0 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1.0 - self.dropout), 0.0)
        return self.activation(self.norm(x))


class NormedMLP(nnx.Module):
    """Hidden :class:`NormedLinear` layers and a last layer, plain or normed.

    Args:
      in_features: width of the input.
      hidden: widths of the hidden layers.
      out_features: width of the output.
      out_activation: makes the last layer a :class:`NormedLinear` with this activation; None leaves it affine.
      dropout: rate in the first layer.
      zero_head: start the (affine) last layer at zero.
      dtype: dtype of matrix products; parameters and outputs are float32.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        *,
        out_activation: Callable[[jax.Array], jax.Array] | None = None,
        dropout: float = 0.0,
        zero_head: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        widths = [in_features, *hidden]
        self.hidden = nnx.List(
            NormedLinear(fan_in, fan_out, dropout=dropout if i == 0 else 0.0, dtype=dtype, rngs=rngs)
            for i, (fan_in, fan_out) in enumerate(zip(widths, hidden, strict=False))
        )
        self.head: NormedLinear | nnx.Linear
        if out_activation is not None:
            self.head = NormedLinear(widths[-1], out_features, activation=out_activation, dtype=dtype, rngs=rngs)
        else:
            init = nnx.initializers.zeros if zero_head else _kernel_init
            self.head = nnx.Linear(widths[-1], out_features, kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[..., in] → [..., out] float32; a key turns the dropout on."""
        # One axis of rows: XLA's CPU reductions and products slow down by a quarter over [H, B, 1, width].
        rows = x.reshape(-1, x.shape[-1])
        return self.after_first_affine(self.hidden[0].affine(rows), key).reshape(*x.shape[:-1], -1)

    def after_first_affine(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Everything behind the first affine map: [..., hidden[0]] → [..., out] float32."""
        x = self.hidden[0].after_affine(x, key)
        for layer in self.hidden[1:]:
            x = layer(x)
        return self.head(x).astype(jnp.float32)
