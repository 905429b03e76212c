"""Convolutions over [N, H, W, C] images, and the two ways DreamerV3 changes their size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from worldloom.nn.linear import RMSNorm, truncated_normal


class Conv(nnx.Module):
    """``kernel × kernel`` convolution, stride 1, same size; kernel [k, k, in, out], bias [out]."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 5, rngs: nnx.Rngs):
        shape = (kernel, kernel, inputs, outputs)
        self.kernel = nnx.Param(truncated_normal(rngs.params(), shape, kernel * kernel * inputs))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, in] → [N, H, W, out]."""
        y = jax.lax.conv_general_dilated(
            x, self.kernel.astype(x.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + self.bias.astype(x.dtype)


class ConvDown(nnx.Module):
    """Conv → 2×2 max-pool → RMSNorm over channels → SiLU: half the size."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, rngs=rngs)
        self.norm = RMSNorm(outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, in] → [N, H/2, W/2, out]."""
        return jax.nn.silu(self.norm(max_pool(self.conv(x))))


class ConvUp(nnx.Module):
    """Nearest-neighbour ×2 → Conv → RMSNorm over channels → SiLU: double the size."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, rngs=rngs)
        self.norm = RMSNorm(outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, in] → [N, 2H, 2W, out]."""
        return jax.nn.silu(self.norm(self.conv(upsample(x))))


def max_pool(x: jax.Array) -> jax.Array:
    """2×2 maximum, stride 2: [N, H, W, C] → [N, H/2, W/2, C]; H and W are even."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


def upsample(x: jax.Array) -> jax.Array:
    """Every pixel four times: [N, H, W, C] → [N, 2H, 2W, C]."""
    n, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)
