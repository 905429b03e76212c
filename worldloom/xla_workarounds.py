"""What only particular XLA compilers need: one function each, with the version it was measured on and the reason."""

from __future__ import annotations

from collections.abc import Callable

import jax


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
