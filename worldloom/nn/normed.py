"""Layers of TD-MPC2: affine map, LayerNorm, Mish (reference: ``common/layers.py``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from worldloom.nn.linear import mesh_matmul
from worldloom.sharding import row_shards

# The reference's `init.weight_init`: normal, truncated at ±2, which at 100 standard deviations truncates nothing.
_kernel_init = nnx.initializers.normal(0.02)


def mish(x: jax.Array) -> jax.Array:
    """x · tanh(log(1 + eˣ)), elementwise (Misra 2019).

    With e = eˣ and n = e·(e + 2), tanh(log(1 + e)) = n / (n + 2): one exponential instead of three transcendental
    functions, which on a CPU takes a quarter of the time.
    """
    # Above 20 the factor is 1 in float32; the bound keeps e · (e + 2) from overflowing.
    e = jnp.exp(jnp.minimum(x, 20.0))
    n = e * (e + 2.0)
    return x * (n / (n + 2.0))


class NormedLinear(nnx.Module):
    """activation(LayerNorm(dropout(x·W + b))), with the dropout before the norm (reference: ``layers.NormedLinear``).

    Args:
      in_features: width of the input.
      out_features: width of the output.
      activation: applied to the normalised output.
      dropout: rate, in [0, 1); active where a call gives a key.
      dtype: dtype of the matrix product; parameters and everything after the product are float32.
      rngs: source of the initial weights.
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
        self.affine = _affine(in_features, out_features, _kernel_init, dtype, rngs)
        # PyTorch's epsilon. Flax's fast variance E[x²] − E[x]² loses digits to cancellation.
        self.norm = nnx.LayerNorm(out_features, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)
        self.activation = activation
        self.dropout = dropout

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[..., in] → [..., out]; a key turns the dropout on."""
        return self.after_affine(self.affine(x), key)

    def after_affine(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Everything after the affine map, [..., out] → [..., out], for callers that fuse several affine maps."""
        x = x.astype(jnp.float32)
        if self.dropout and key is not None:
            kept = jax.random.bernoulli(key, 1.0 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1.0 - self.dropout), 0.0)
        return self.activation(self.norm(x))


def _affine(inputs: int, outputs: int, init: Callable[..., jax.Array], dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, kernel_init=init, dtype=dtype, dot_general=_dot_general, rngs=rngs)


def _dot_general(x: jax.Array, kernel: jax.Array, dimensions: Any, **options: Any) -> jax.Array:
    """``x W`` as :class:`flax.nnx.Linear` asks for it."""
    return mesh_matmul(x, kernel) if row_shards() > 1 else jax.lax.dot_general(x, kernel, dimensions, **options)


class NormedMLP(nnx.Module):
    """Hidden :class:`NormedLinear` layers and a last layer, affine or normed (reference: ``layers.mlp``).

    Args:
      in_features: width of the input.
      hidden: widths of the hidden layers, at least one.
      out_features: width of the output.
      out_activation: makes the last layer a :class:`NormedLinear` with this activation; None leaves it affine.
      dropout: rate in the first layer.
      zero_head: initialise an affine last layer with zeros.
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
            self.head = _affine(widths[-1], out_features, init, dtype, rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[..., in] → [..., out] float32; a key turns the dropout on."""
        # Flattened to [rows, width]: on [H, B, 1, width] XLA's CPU reductions and products are a quarter slower.
        rows = x if row_shards() > 1 else x.reshape(-1, x.shape[-1])
        return self.after_first_affine(self.hidden[0].affine(rows), key).reshape(*x.shape[:-1], -1)

    def after_first_affine(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Everything after the first affine map: [..., hidden[0]] → [..., out] float32."""
        x = self.hidden[0].after_affine(x, key)
        for layer in self.hidden[1:]:
            x = layer(x)
        return self.head(x).astype(jnp.float32)
