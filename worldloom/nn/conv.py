"""Convolutions over [N, H, W, C] images, and the two ways DreamerV3 changes their size."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from worldloom.nn.linear import RMSNorm, truncated_normal
from worldloom.xla_workarounds import conv_kernel_gradient, convolves_faster_in_squares


class Conv(nnx.Module):
    """``kernel × kernel`` convolution, stride 1, same size; kernel [k, k, in, out] with k odd, bias [out].

    Next to a change of size it works on squares of 2×2 pixels, with a kernel assembled from the same weights.
    Results are equal up to rounding, and XLA's convolutions are several times faster with four times the channels.
    """

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 5, rngs: nnx.Rngs):
        shape = (kernel, kernel, inputs, outputs)
        self.kernel = nnx.Param(truncated_normal(rngs, shape, kernel * kernel * inputs))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, in] → [N, H, W, out]."""
        return _convolve(x, self.kernel.astype(x.dtype)) + self.bias.astype(x.dtype)

    def conv_pool(self, x: jax.Array) -> jax.Array:
        """``max_pool(self(x))``: [N, H, W, in] → [N, H/2, W/2, out]; H and W are even."""
        if not convolves_faster_in_squares(x.shape[-1]):
            return max_pool(self(x))
        # With few channels, one convolution over squares computes the four results of each square as its channels.
        # Input pixel (a, b) of square (u, v) contributes to output pixel (p, q) through the tap at
        # (2u + a − p, 2v + b − q), if the kernel has such a tap.
        n, h, w, c = x.shape
        squares = x.reshape(n, h // 2, 2, w // 2, 2, c).swapaxes(2, 3).reshape(n, h // 2, w // 2, 4 * c)
        taps = _taps_between_squares(self.kernel.shape[0])
        kernel = _exact_einsum("uapy,vbqx,yxco->uvabcpqo", taps, taps, self.kernel[...])
        y = _convolve(squares, kernel.reshape(*kernel.shape[:2], 4 * c, -1).astype(x.dtype))
        # The bias is the same for all four pixels, so it can be added after the maximum.
        return y.reshape(*y.shape[:-1], 4, -1).max(-2) + self.bias.astype(x.dtype)

    def upsample_conv(self, x: jax.Array) -> jax.Array:
        """Nearest-neighbour ×2, then the convolution: [N, H, W, in] → squares [N, H, W, 2, 2, out].

        :func:`depth_to_space` turns the squares into an image.
        """
        # After upsampling, several taps see copies of the same pixel: their weights are summed first, which leaves
        # 9 multiplications per result in place of 25 (for a 5×5 kernel).
        taps = _taps_on_copies(self.kernel.shape[0])
        kernel = _exact_einsum("upy,vqx,yxco->uvcpqo", taps, taps, self.kernel[...])
        y = _convolve(x, kernel.reshape(*kernel.shape[:3], -1).astype(x.dtype))
        return y.reshape(*y.shape[:-1], 2, 2, -1) + self.bias.astype(x.dtype)


class ConvDown(nnx.Module):
    """Conv → 2×2 max-pool → RMSNorm over channels → SiLU: half the size (danijar/dreamerv3 rssm.py ``Encoder``)."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, rngs=rngs)
        self.norm = RMSNorm(outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, in] → [N, H/2, W/2, out]."""
        return jax.nn.silu(self.norm(self.conv.conv_pool(x)))


class ConvUp(nnx.Module):
    """Nearest-neighbour ×2 → Conv → RMSNorm over channels → SiLU: double the size (rssm.py ``Decoder``)."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, rngs=rngs)
        self.norm = RMSNorm(outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, in] → [N, 2H, 2W, out]."""
        # Norm and activation treat every pixel alike, so the pixels are moved once, after them.
        return depth_to_space(jax.nn.silu(self.norm(self.conv.upsample_conv(x))))


def max_pool(x: jax.Array) -> jax.Array:
    """2×2 maximum, stride 2: [N, H, W, C] → [N, H/2, W/2, C]; H and W are even."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


def depth_to_space(squares: jax.Array) -> jax.Array:
    """Squares [N, H, W, 2, 2, C] as an image [N, 2H, 2W, C]."""
    n, h, w, _, _, c = squares.shape
    return squares.swapaxes(2, 3).reshape(n, 2 * h, 2 * w, c)


# These einsums only move and add weights, which must not lose digits to a GPU's default precision.
_exact_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _plain_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _plain_conv(x, kernel), (x, kernel)


def _backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals

    def kernel_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.vjp(functools.partial(_plain_conv, x), kernel)[1](g)[0]

    x_gradient = jax.vjp(lambda x: _plain_conv(x, kernel), x)[1](g)[0]
    return x_gradient, conv_kernel_gradient(kernel_gradient, x, g)


# A convolution with XLA's own gradients, but for the CPU workaround in the kernel's.
_convolve = jax.custom_vjp(_plain_conv)
_convolve.defvjp(_forward, _backward)


@functools.cache
def _taps_between_squares(size: int) -> np.ndarray:
    """[u, a, p, y] is 1 where tap y leads from pixel a of square u to output pixel p; the middle u is p's square."""
    reach = (size // 2 + 1) // 2
    u, a, p, y = np.ogrid[: 2 * reach + 1, :2, :2, :size]
    return (2 * (u - reach) + a - p + size // 2 == y).astype(np.float32)


@functools.cache
def _taps_on_copies(size: int) -> np.ndarray:
    """[u, p, y] is 1 where tap y of output pixel p falls on a copy of pixel u; the middle u is the pixel p copies."""
    reach = (size // 2 + 1) // 2
    u, p, y = np.ogrid[: 2 * reach + 1, :2, :size]
    return ((p + y - size // 2) // 2 + reach == u).astype(np.float32)
