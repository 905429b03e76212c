"""Linear maps, RMS norm and the MLP of DreamerV3: float32 weights, computed in the dtype of their input.

The counterparts in danijar/dreamerv3 are ``Linear``, ``BlockLinear``, ``Norm`` and ``MLP`` of ``embodied/jax/nets.py``.
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from worldloom.errors import ConfigError
from worldloom.sharding import row_shards

# A normal cut at ±2 standard deviations has a standard deviation of 1 / 1.1368.
TRUNCATION = 1.1368


class OneDraw(nnx.Rngs):
    """Rngs whose truncated normals are slices of a single draw.

    Compiling one draw takes as long as compiling the draw of a single weight, and a model has hundreds of weights.

    Args:
      key: root key; the streams are those of ``nnx.Rngs(key)``.
      size: numbers to draw; a request beyond them raises ``TypeError`` (of ``reshape``).
    """

    def __init__(self, key: jax.Array, size: int):
        super().__init__(key)
        self._numbers = jax.random.truncated_normal(jax.random.fold_in(key, size), -2.0, 2.0, (size,))
        self._used = 0

    def truncated_normal(self, lower: float, upper: float, shape: tuple[int, ...]) -> jax.Array:
        """The next numbers of the draw."""
        if (lower, upper) != (-2, 2):
            raise ConfigError(
                f"Weights were asked for between {lower} and {upper}; a model's rngs draws between -2 and 2 standard "
                "deviations. For others: jax.random.truncated_normal(rngs.params(), …)."
            )
        start, self._used = self._used, self._used + math.prod(shape)
        return self._numbers[start : self._used].reshape(shape)


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
        return self.matmul(x) + self.bias.astype(x.dtype)

    def matmul(self, x: jax.Array, known: jax.Array | None = None) -> jax.Array:
        """``x W``, without the bias: [..., in] → [..., out].

        ``known`` is the value of ``x W`` [..., out] if it was computed before. It is returned as it is, and the
        gradient then reaches W alone, neither x nor ``known``.
        """
        kernel = self.kernel.astype(x.dtype)
        if known is not None:
            return _known_matmul(x, kernel, known)
        if row_shards() > 1:
            return mesh_matmul(x, kernel)
        # One axis of rows: with two, XLA on CPUs copies the gradient before it multiplies it with x.
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def mesh_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x W`` of rows that are divided over devices: [..., in] times [in, out] → [..., out].

    The gradient of W is computed as [in, out]. JAX's own rule computes [out, in] and transposes it, which XLA can only
    make part of the product while no sum over devices stands between the two: on two CPU devices a twentieth of an
    update of TD-MPC2.
    """
    return x @ kernel


def _mesh_matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _mesh_matmul_backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    return g @ kernel.T, _kernel_gradient(x, g)


mesh_matmul.defvjp(_mesh_matmul_forward, _mesh_matmul_backward)


def _kernel_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """``xᵀ g`` over all rows: [..., in] and [..., out] → [in, out]."""
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, g, ((rows, rows), ((), ())))


@jax.custom_vjp
def _known_matmul(x: jax.Array, kernel: jax.Array, product: jax.Array) -> jax.Array:
    return product


def _known_matmul_forward(x: jax.Array, kernel: jax.Array, product: jax.Array) -> tuple[jax.Array, jax.Array]:
    return product, x


def _known_matmul_backward(x: jax.Array, g: jax.Array) -> tuple[None, jax.Array, None]:
    if row_shards() > 1:
        return None, _kernel_gradient(x, g), None
    return None, x.reshape(-1, x.shape[-1]).T @ g.reshape(-1, g.shape[-1]), None


_known_matmul.defvjp(_known_matmul_forward, _known_matmul_backward)


class BlockLinear(nnx.Module):
    """A block-diagonal linear map: chunk k of the input alone makes chunk k of the output.

    Kernel [blocks, in/blocks, out/blocks], bias [out]. The initial variance is that of a dense layer of the full
    input width, as in the reference's ``BlockLinear``, not that of ``blocks`` separate layers.

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

    def split(self, x: jax.Array, parts: int) -> list[jax.Array]:
        """[..., in] → ``parts`` arrays [..., out/parts]: each block's outputs are cut into that many equal pieces."""
        blocks = self.kernel.shape[0]
        bias = self.bias.astype(x.dtype).reshape(blocks, parts, -1).swapaxes(0, 1).reshape(parts, -1)
        y = block_matmul(x, self.kernel.astype(x.dtype), parts)
        return [y[i] + bias[i] for i in range(parts)]


def block_matmul(x: jax.Array, kernel: jax.Array, parts: int = 1) -> jax.Array:
    """[..., g·i] times block-diagonal [g, i, parts·o] → [..., g·o] or, for several parts, [parts, ..., g·o]."""
    # The block axis leads in the product, where XLA puts it anyway, and each array is transposed once: with the
    # transpositions written into the einsum, XLA on CPUs takes five times as long.
    blocks, inputs, _ = kernel.shape
    chunks = jnp.moveaxis(x.reshape(*x.shape[:-1], blocks, inputs), -2, 0)
    y = jnp.einsum("g...i,gio->g...o", chunks, kernel)
    y = y.reshape(*y.shape[:-1], parts, -1)
    y = jnp.moveaxis(y, (-2, 0), (0, -2)).reshape(parts, *x.shape[:-1], -1)
    return y if parts > 1 else y[0]


class RMSNorm(nnx.Module):
    """``x · rsqrt(mean(x²) + 1e-4) · scale`` over the last axis, computed in float32; no centring, no bias.

    Zhang & Sennrich 2019; ``Norm('rms')`` of the reference, with its ε.
    """

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

    def norm_act(self, product: jax.Array) -> jax.Array:
        """What follows the product ``x W`` [..., out] with the kernel: bias, norm, activation."""
        return jax.nn.silu(self.norm(product + self.linear.bias.astype(product.dtype)))


class MLP(nnx.Module):
    """``layers`` × :class:`Dense` of ``width`` units; no output layer."""

    def __init__(self, inputs: int, width: int, layers: int, *, rngs: nnx.Rngs):
        widths = [inputs] + [width] * layers
        self.layers = nnx.List([Dense(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] → [..., width]."""
        return self.after_first_matmul(self.first_matmul(x))

    def first_matmul(self, x: jax.Array, known: jax.Array | None = None) -> jax.Array:
        """The first layer's product with its kernel, [..., in] → [..., width]; see :meth:`Linear.matmul`."""
        return self.layers[0].linear.matmul(x, known)

    def after_first_matmul(self, product: jax.Array) -> jax.Array:
        """Everything that follows :meth:`first_matmul`: [..., width] → [..., width]."""
        x = self.layers[0].norm_act(product)
        for layer in self.layers[1:]:
            x = layer(x)
        return x
