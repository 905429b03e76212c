"""What only XLA's CPU compiler needs, each with the JAX version it was measured on and the reason.

All figures: JAX 0.10.2, two x86 cores. GPUs and TPUs take none of these paths. Remove one when its measurement, said in
its docstring, no longer holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def quick_to_compile() -> dict[str, int] | None:
    """Compiler options for a program that runs once, such as drawing initial weights.

    JAX 0.10.2: with full optimization, compiling the initial weights of DreamerV3 ``size12m`` takes seconds longer than
    it saves.
    """
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


def needs_unrolled_updates(model: Any, device: jax.Device) -> bool:
    """Whether an update of ``model`` must not stand inside a loop: models of images, on a CPU.

    JAX 0.10.2: inside ``lax.fori_loop`` or ``lax.scan`` XLA's CPU gradients of convolutions leave the multithreaded
    library (Eigen) for a plain loop nest, a hundred times slower. What is computed outside may be rounded differently.
    """
    shape = getattr(model.config, "obs_shape", ())
    shapes = shape.values() if isinstance(shape, Mapping) else [shape]
    return device.platform == "cpu" and any(len(each) == 3 for each in shapes)


def needs_unrolled_scan(device: jax.Device, arrays: Any) -> bool:
    """Whether a scan over microbatches [parts, B, T, ...] must be unrolled: images [parts, B, T, H, W, C], on a CPU.

    The reason is that of :func:`needs_unrolled_updates`.
    """
    return device.platform == "cpu" and any(x.ndim == 6 for x in jax.tree.leaves(arrays))


def conv_kernel_gradient(
    kernel_gradient: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, g: jax.Array
) -> jax.Array:
    """``kernel_gradient(x, g)`` of a convolution; on CPUs summed over groups of images.

    JAX 0.10.2, XLA on CPUs: the gradient is itself a convolution with the image index as its innermost axis. The
    values of 1,000 images then lie a power of two apart in memory and evict each other from the cache, which costs
    four fifths of the time. Groups of at least 64 images do not have the problem; at most 16 groups bound the size
    of the program.

    Args:
      kernel_gradient: (images [n, H, W, in], cotangents [n, H', W', out]) → gradient of the kernel, linear in the
        images: the sum over groups is the gradient of the whole, up to rounding.
      x: images [N, H, W, in].
      g: cotangents [N, H', W', out].
    """

    def in_groups(x: jax.Array, g: jax.Array) -> jax.Array:
        size = max(64, -(-len(x) // 16))
        parts = [kernel_gradient(x[i : i + size], g[i : i + size]) for i in range(0, len(x), size)]
        return sum(parts[1:], parts[0])

    return jax.lax.platform_dependent(x, g, cpu=in_groups, default=kernel_gradient)


def pad_single_update(batches: Any) -> Any:
    """Batches [1, B, T, ...] with a second, unused entry; others as they are.

    JAX 0.10.2: XLA folds an axis of length one away, then fuses and rounds the update differently. With two entries,
    one update per call gives the bits that eight per call give. Applied on every device: a run may move.
    """
    if jax.tree.leaves(batches)[0].shape[0] > 1:
        return batches
    return jax.tree.map(lambda x: jnp.concatenate([x, x]), batches)
