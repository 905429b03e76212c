"""Workarounds for XLA's CPU compiler, each with its reason and the JAX version it was measured on.

All figures: JAX 0.10.2, two x86 cores. GPUs and TPUs use none of these paths, except :func:`pad_single_update` and
:func:`convolves_faster_in_squares`. Remove a workaround when the measurement in its docstring no longer holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from worldloom.sharding import row_shards


def fast_compile_options() -> dict[str, int] | None:
    """Compiler options for a program that runs once, such as the initialization of weights.

    JAX 0.10.2: with full optimization, compiling the initialization of DreamerV3 ``size12m`` takes seconds longer, and
    saves less than that at run time.
    """
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


def needs_unrolled_updates(model: Any, device: jax.Device) -> bool:
    """Whether an update of ``model`` must not run inside a loop: models of images, on a CPU.

    JAX 0.10.2: inside ``lax.fori_loop`` or ``lax.scan``, XLA computes gradients of convolutions on CPUs by a plain loop
    nest instead of the multithreaded library (Eigen), a hundred times slower. Results outside the loop may be rounded
    differently.
    """
    shape = getattr(model.config, "obs_shape", ())
    shapes = shape.values() if isinstance(shape, Mapping) else [shape]
    return device.platform == "cpu" and any(len(each) == 3 for each in shapes)


def needs_unrolled_scan(device: jax.Device, arrays: Any) -> bool:
    """Whether a scan over microbatches [parts, B, T, ...] must be unrolled: images [parts, B, T, H, W, C], on a CPU.

    For the reason see :func:`needs_unrolled_updates`.
    """
    return device.platform == "cpu" and any(x.ndim == 6 for x in jax.tree.leaves(arrays))


def convolves_faster_in_squares(channels: int) -> bool:
    """Whether a convolution next to a pool, of so many input channels, is computed over squares of 2×2 pixels.

    JAX 0.10.2, XLA on CPUs: a convolution of few channels is bound by memory, and several times faster with four times
    the channels; up to 16 that outweighs 44 % more multiplications. Decided by the shape alone, so that every device
    computes, and rounds, by the same form.
    """
    return channels <= 16


def conv_kernel_gradient(
    kernel_gradient: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, g: jax.Array
) -> jax.Array:
    """``kernel_gradient(x, g)`` of a convolution; on CPUs summed over groups of images.

    JAX 0.10.2, XLA on CPUs: the gradient is itself a convolution with the image index as its innermost axis. With 1,000
    images the memory stride is a power of two, so values evict each other from the cache, which costs four fifths of
    the time. Groups of at least 64 images avoid this; at most 16 groups bound the size of the program.

    Args:
      kernel_gradient: (images [n, H, W, in], cotangents [n, H', W', out]) → gradient of the kernel, linear in the
        images: the sum over groups is the gradient of the whole, up to rounding.
      x: images [N, H, W, in].
      g: cotangents [N, H', W', out].
    """

    shards = row_shards()
    of_each = len(x) // shards

    def in_groups(x: jax.Array, g: jax.Array) -> jax.Array:
        size = max(64, -(-of_each // 16))

        def group(images: jax.Array, i: int) -> jax.Array:
            if shards == 1:
                return images[i : i + size]
            # Images are divided over the devices of a mesh: a group takes as many from each.
            return images.reshape(shards, of_each, *images.shape[1:])[:, i : i + size].reshape(-1, *images.shape[1:])

        parts = [kernel_gradient(group(x, i), group(g, i)) for i in range(0, of_each, size)]
        return sum(parts[1:], parts[0])

    return jax.lax.platform_dependent(x, g, cpu=in_groups, default=kernel_gradient)


def pad_single_update(batches: Any) -> Any:
    """Batches [1, B, T, ...] with a second, unused entry; batches [K > 1, B, T, ...] unchanged.

    JAX 0.10.2: XLA removes an axis of length one, then fuses and rounds the update differently. With two entries, one
    update per call gives bit for bit what eight per call give. Applied on every device, because a run may be resumed on
    another one.
    """
    if jax.tree.leaves(batches)[0].shape[0] > 1:
        return batches
    return jax.tree.map(lambda x: jnp.concatenate([x, x]), batches)
