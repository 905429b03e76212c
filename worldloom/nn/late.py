"""A scan whose kernels get their gradients from all of its steps at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from worldloom.nn.linear import block_matmul

Kernels = dict[str, jax.Array]


class Products:
    """Products with kernels by name: [in, out] ones, or [blocks, in, out] for block-diagonal ones.

    Args:
      kernels: the kernels.
      taps: what is added to each product, nothing by default.

    Attributes:
      inputs: what was multiplied, by name of the kernel.
      outputs: the products.
    """

    def __init__(self, kernels: Kernels, taps: Kernels | None = None):
        self._kernels, self._taps = kernels, taps
        self.inputs: Kernels = {}
        self.outputs: Kernels = {}

    def __call__(self, name: str, x: jax.Array, parts: int = 1) -> jax.Array:
        """[..., in] → [..., out] or, for several parts of each block's outputs, [parts, ..., out / parts]."""
        assert name not in self.inputs, f"the kernel {name} is used twice"
        y = _multiply(x, self._kernels[name], parts)
        if self._taps is not None:
            y += self._taps[name]
        self.inputs[name], self.outputs[name] = x, y
        return y


Step = Callable[[Any, Products, Any, Any, jax.Array | None], tuple[Any, Any]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def late_scan(
    step: Step, weights: Any, kernels: Kernels, initial: Any, rows: Any, noise: jax.Array | None
) -> tuple[Any, Any]:
    """``lax.scan`` of ``step(weights, products, carry, row, noise) -> (carry, out)``.

    Differentiated by ``lax.scan`` itself, each step adds to the gradient of each kernel a product of a few rows. Here
    the loop backwards keeps what reaches the products' outputs, and one product over all steps follows it.

    Args:
      step: closes over nothing that is traced; calls ``products(name, x)`` once for every kernel.
      weights: what else of the model it needs.
      kernels: by name.
      initial: carry before the first step.
      rows: scanned over.
      noise: scanned over, not differentiated: random numbers, or keys, or None.

    Returns:
      As ``lax.scan``.
    """
    return jax.lax.scan(lambda carry, now: step(weights, Products(kernels), carry, *now), initial, (rows, noise))


def _forward(
    step: Step, weights: Any, kernels: Kernels, initial: Any, rows: Any, noise: jax.Array | None
) -> tuple[Any, Any]:
    def tapped(weights: Any, initial: Any, rows: Any, taps: Kernels) -> Any:
        def one(carry: Any, now: Any) -> Any:
            row, noise, tap = now
            products = Products(kernels, tap)
            carry, out = step(weights, products, carry, row, noise)
            return carry, (out, products.inputs)

        carry, (outs, inputs) = jax.lax.scan(one, initial, (rows, noise, taps))
        return (carry, outs), inputs

    def outputs(carry: Any, now: Any) -> Kernels:
        products = Products(kernels)
        step(weights, products, carry, *now)
        return products.outputs

    first = jax.tree.map(lambda x: x[0], (rows, noise))
    length = len(jax.tree.leaves(rows)[0])
    shapes = jax.eval_shape(outputs, initial, first)
    taps = {name: jnp.zeros((length, *shape.shape), shape.dtype) for name, shape in shapes.items()}
    out, pull, inputs = jax.vjp(tapped, weights, initial, rows, taps, has_aux=True)
    return out, (pull, inputs, kernels)


def _backward(step: Step, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    pull, inputs, kernels = residuals
    weights, initial, rows, reached = pull(cotangents)
    gradients = {name: _gradient(kernels[name], inputs[name], reached[name]) for name in kernels}
    return weights, gradients, initial, rows, None


late_scan.defvjp(_forward, _backward)


def _multiply(x: jax.Array, kernel: jax.Array, parts: int) -> jax.Array:
    return x @ kernel if kernel.ndim == 2 else block_matmul(x, kernel, parts)


def _gradient(kernel: jax.Array, x: jax.Array, reached: jax.Array) -> jax.Array:
    """Of a kernel, from its inputs [T, B, in] and what reached its outputs: [T, B, out] or [T, parts, B, out]."""
    parts = reached.shape[1] if reached.ndim > x.ndim else 1
    reached = jnp.moveaxis(reached.reshape(len(x), parts, -1, reached.shape[-1]), 1, 0)
    reached = reached.reshape(parts, -1, reached.shape[-1])
    x = x.reshape(-1, x.shape[-1])
    return jax.vjp(lambda kernel: _multiply(x, kernel, parts), kernel)[1](reached if parts > 1 else reached[0])[0]
