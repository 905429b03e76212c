"""Convolutions over [N, H, W, C] images, and the two ways DreamerV3 changes their size."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from worldloom.nn.linear import RMSNorm, truncated_normal

FEW_CHANNELS = 16
"""Up to so many input channels a convolution over 2×2 squares, with 44 % more products, is the faster one."""


class Conv(nnx.Module):
    """``kernel × kernel`` convolution, stride 1, same size; kernel [k, k, in, out] with k odd, bias [out].

    Where it meets a change of size it works on squares of 2×2 pixels, with a kernel put together from the same weights.
    Results are equal up to rounding; XLA's convolutions are several times faster with four times the channels.
    """

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 5, rngs: nnx.Rngs):
        shape = (kernel, kernel, inputs, outputs)
        self.kernel = nnx.Param(truncated_normal(rngs, shape, kernel * kernel * inputs))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, in] → [N, H, W, out]."""
        return _convolve(x, self.kernel.astype(x.dtype)) + self.bias.astype(x.dtype)

    def pooled(self, x: jax.Array) -> jax.Array:
        """``max_pool(self(x))``: [N, H, W, in] → [N, H/2, W/2, out]; H and W are even.

        With few channels the four results of a square are channels of one convolution over squares: input pixel (a, b)
        of square (u, v) meets output pixel (p, q) with the tap at ``(2u + a − p, 2v + b − q)``, if there is one.
        """
        if x.shape[-1] > FEW_CHANNELS:
            return max_pool(self(x))
        n, h, w, c = x.shape
        squares = x.reshape(n, h // 2, 2, w // 2, 2, c).swapaxes(2, 3).reshape(n, h // 2, w // 2, 4 * c)
        taps = _taps_between_squares(self.kernel.shape[0])
        kernel = _exact_einsum("uapy,vbqx,yxco->uvabcpqo", taps, taps, self.kernel[...])
        y = _convolve(squares, kernel.reshape(*kernel.shape[:2], 4 * c, -1).astype(x.dtype))
        return y.reshape(*y.shape[:-1], 4, -1).max(-2) + self.bias.astype(x.dtype)

    def doubled(self, x: jax.Array) -> jax.Array:
        """The convolution of x with every pixel four times: [N, H, W, in] → squares [N, H, W, 2, 2, out].

        Taps that fall on copies of the same pixel are added up first: 9 products per result in place of 25.
        :func:`put_in_place` makes an image of the squares.
        """
        taps = _taps_on_copies(self.kernel.shape[0])
        kernel = _exact_einsum("upy,vqx,yxco->uvcpqo", taps, taps, self.kernel[...])
        y = _convolve(x, kernel.reshape(*kernel.shape[:3], -1).astype(x.dtype))
        return y.reshape(*y.shape[:-1], 2, 2, -1) + self.bias.astype(x.dtype)


class ConvDown(nnx.Module):
    """Conv → 2×2 max-pool → RMSNorm over channels → SiLU: half the size."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, rngs=rngs)
        self.norm = RMSNorm(outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, in] → [N, H/2, W/2, out]."""
        return jax.nn.silu(self.norm(self.conv.pooled(x)))


class ConvUp(nnx.Module):
    """Nearest-neighbour ×2 → Conv → RMSNorm over channels → SiLU: double the size."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, rngs=rngs)
        self.norm = RMSNorm(outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, in] → [N, 2H, 2W, out]."""
        return put_in_place(jax.nn.silu(self.norm(self.conv.doubled(x))))


def max_pool(x: jax.Array) -> jax.Array:
    """2×2 maximum, stride 2: [N, H, W, C] → [N, H/2, W/2, C]; H and W are even."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


def put_in_place(squares: jax.Array) -> jax.Array:
    """Squares [N, H, W, 2, 2, C] as an image [N, 2H, 2W, C]."""
    n, h, w, _, _, c = squares.shape
    return squares.swapaxes(2, 3).reshape(n, 2 * h, 2 * w, c)


# Weights are only moved and added here, which must not cost them digits on a GPU.
_exact_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """XLA's gradients, but on CPUs that of the kernel a few images at a time.

    It is computed with images as the innermost axis; a thousand of them lie a power of two apart and evict each other
    from the cache, which costs four fifths of the time.
    """
    x, kernel = residuals

    def to_kernel(x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.vjp(functools.partial(_plain, x), kernel)[1](g)[0]

    def in_parts(x: jax.Array, g: jax.Array) -> jax.Array:
        size = max(64, -(-len(x) // 16))
        parts = [to_kernel(x[i : i + size], g[i : i + size]) for i in range(0, len(x), size)]
        return sum(parts[1:], parts[0])

    to_x = jax.vjp(lambda x: _plain(x, kernel), x)[1](g)[0]
    return to_x, jax.lax.platform_dependent(x, g, cpu=in_parts, default=to_kernel)


_convolve = jax.custom_vjp(_plain)
_convolve.defvjp(lambda x, kernel: (_plain(x, kernel), (x, kernel)), _backward)


@functools.cache
def _taps_between_squares(size: int) -> np.ndarray:
    """1 at [u, a, p, y] where tap y leads from pixel a of square u (the middle one is the own) to output pixel p."""
    reach = (size // 2 + 1) // 2
    u, a, p, y = np.ogrid[: 2 * reach + 1, :2, :2, :size]
    return (2 * (u - reach) + a - p + size // 2 == y).astype(np.float32)


@functools.cache
def _taps_on_copies(size: int) -> np.ndarray:
    """1 at [u, p, y] where tap y of output pixel p falls on a copy of pixel u (the middle one is the own)."""
    reach = (size // 2 + 1) // 2
    u, p, y = np.ogrid[: 2 * reach + 1, :2, :size]
    return ((p + y - size // 2) // 2 + reach == u).astype(np.float32)
