"""Linear maps, RMS norm and the MLP of DreamerV3: float32 weights, computed in the dtype of their input."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx

# A normal cut at ±2 standard deviations has a standard deviation of 1 / 1.1368.
TRUNCATION = 1.1368


class OneDraw(nnx.Rngs):
    """Rngs whose truncated normals are cut from a single draw: compiling one takes as long for a weight as for all.

    Args:
      key: of that draw and of the streams, which are those of ``nnx.Rngs(key)``.
      size: numbers to draw, at least as many as will be taken.
    """

    def __init__(self, key: jax.Array, size: int):
        super().__init__(key)
        self._numbers = jax.random.truncated_normal(jax.random.fold_in(key, size), -2.0, 2.0, (size,))
        self._taken = 0

    def truncated_normal(self, lower: float, upper: float, shape: tuple[int, ...]) -> jax.Array:
        """The next numbers of the draw."""
        assert (lower, upper) == (-2, 2)
        start, self._taken = self._taken, self._taken + math.prod(shape)
        return self._numbers[start : self._taken].reshape(shape)


def truncated_normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, scale: float = 1.0) -> jax.Array:
    """Normal draws cut at ±2σ whose realised standard deviation is ``scale · sqrt(1 / fan_in)``."""
    return rngs.truncated_normal(-2.0, 2.0, shape) * (TRUNCATION * scale * fan_in**-0.5)


class Linear(nnx.Module):
    """``y = x W + b``; kernel [in, out], bias [out] starting at 0.

    Args:
      inputs: width of the last axis of x.
      outputs: width of the last axis of y.
      scale: multiplies the *initial* kernel only (0 starts a head at exactly 0).
      rngs: source of the initial kernel.
    """

    def __init__(self, inputs: int, outputs: int, *, scale: float = 1.0, rngs: nnx.Rngs):
        self.kernel = nnx.Param(truncated_normal(rngs, (inputs, outputs), inputs, scale))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] → [..., out]."""
        return self.product(x) + self.bias.astype(x.dtype)

    def product(self, x: jax.Array, known: jax.Array | None = None) -> jax.Array:
        """``x W`` [..., in] → [..., out].

        ``known`` is its value where it was computed before; then a gradient reaches W alone.
        """
        kernel = self.kernel.astype(x.dtype)
        if known is not None:
            return _known_product(x, kernel, known)
        # One axis of rows: of two, CPUs would copy the gradient for the product with x.
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _known_product(x: jax.Array, kernel: jax.Array, product: jax.Array) -> jax.Array:
    return product


def _product_forward(x: jax.Array, kernel: jax.Array, product: jax.Array) -> tuple[jax.Array, jax.Array]:
    return product, x


def _product_backward(x: jax.Array, reached: jax.Array) -> tuple[None, jax.Array, None]:
    return None, x.reshape(-1, x.shape[-1]).T @ reached.reshape(-1, reached.shape[-1]), None


_known_product.defvjp(_product_forward, _product_backward)


class BlockLinear(nnx.Module):
    """A block-diagonal linear map: chunk k of the input alone makes chunk k of the output.

    Kernel [blocks, in/blocks, out/blocks], bias [out]. The initial variance is that of a dense layer of the full
    input width, as in DreamerV3 (danijar/dreamerv3 ``nn.BlockLinear``), not that of ``blocks`` separate layers.

    Args:
      inputs, outputs: full widths, multiples of ``blocks``.
      blocks: number of chunks.
      rngs: source of the initial kernel.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int, *, rngs: nnx.Rngs):
        shape = (blocks, inputs // blocks, outputs // blocks)
        self.kernel = nnx.Param(truncated_normal(rngs, shape, inputs))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] → [..., out]."""
        return block_matmul(x, self.kernel.astype(x.dtype)) + self.bias.astype(x.dtype)


def block_matmul(x: jax.Array, kernel: jax.Array, parts: int = 1) -> jax.Array:
    """[..., g·i] times block-diagonal [g, i, parts·o] → [..., g·o] or, for several parts, [parts, ..., g·o].

    Blocks come first in the product, where XLA puts them anyway, and move once: writing the moves into the einsum
    costs CPUs five times as much.
    """
    blocks, inputs, _ = kernel.shape
    chunks = jnp.moveaxis(x.reshape(*x.shape[:-1], blocks, inputs), -2, 0)
    y = jnp.einsum("g...i,gio->g...o", chunks, kernel)
    y = y.reshape(*y.shape[:-1], parts, -1)
    y = jnp.moveaxis(y, (-2, 0), (0, -2)).reshape(parts, *x.shape[:-1], -1)
    return y if parts > 1 else y[0]


class RMSNorm(nnx.Module):
    """``x · rsqrt(mean(x²) + 1e-4) · scale`` over the last axis, in float32; no mean is subtracted, nothing added."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalised x, in its own dtype."""
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + 1e-4)
        return (wide * (inverse * self.scale[...])).astype(x.dtype)


class Dense(nnx.Module):
    """One hidden layer: Linear → RMSNorm → SiLU."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.linear = Linear(inputs, outputs, rngs=rngs)
        self.norm = RMSNorm(outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] → [..., out]."""
        return jax.nn.silu(self.norm(self.linear(x)))

    def finish(self, product: jax.Array) -> jax.Array:
        """What is left to do after the product with the kernel."""
        return jax.nn.silu(self.norm(product + self.linear.bias.astype(product.dtype)))


class MLP(nnx.Module):
    """``layers`` × :class:`Dense` of ``width`` units; no output layer."""

    def __init__(self, inputs: int, width: int, layers: int, *, rngs: nnx.Rngs):
        widths = [inputs] + [width] * layers
        self.layers = nnx.List([Dense(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] → [..., width]."""
        return self.finish(self.product(x))

    def product(self, x: jax.Array, known: jax.Array | None = None) -> jax.Array:
        """That of the first layer; see :meth:`Linear.product`."""
        return self.layers[0].linear.product(x, known)

    def finish(self, product: jax.Array) -> jax.Array:
        """What is left to do after :meth:`product`."""
        x = self.layers[0].finish(product)
        for layer in self.layers[1:]:
            x = layer(x)
        return x
