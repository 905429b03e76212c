"""Random translation of images."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def random_shift(images: jax.Array, key: jax.Array, pad: int = 3) -> jax.Array:
    """Shift each image by whole pixels, up to ``pad`` in each direction, repeating border pixels.

    The offset is uniform over (2·pad + 1)², one per image, the same for all its channels (Kostrikov et al. 2020;
    reference: ``layers.ShiftAug``, whose bilinear sampling at integer offsets equals this crop up to rounding).

    Args:
      images: [N, H, W, C].
      key: consumed.
      pad: largest shift in pixels, at least 0.

    Returns:
      [N, H, W, C] of the dtype of ``images``.
    """
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    corners = jax.random.randint(key, (images.shape[0], 2), 0, 2 * pad + 1)
    crop = lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])  # noqa: E731
    return jax.vmap(crop)(padded, corners)
