"""Encoders of TD-MPC2: vectors, images of any side, and several of them together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from worldloom.models.pictures import picture_layout
from worldloom.models.tdmpc2.config import PICTURE_CHANNELS, TDMPC2Config, picture_convolutions, picture_features
from worldloom.nn.normed import NormedLinear, NormedMLP, mish
from worldloom.ops.keys import split_key
from worldloom.ops.random_shift import random_shift
from worldloom.ops.simnorm import simnorm
from worldloom.ops.symlog import symlog

Observation = jax.Array | Mapping[str, jax.Array]
"""What encoders take: one array, or arrays by name in the config's order."""


@dataclasses.dataclass(frozen=True)
class SimNorm:
    """:func:`worldloom.ops.simnorm.simnorm` with its group size, as an activation.

    Compares by value, unlike a closure: models of equal configs then have equal graph definitions and share one
    compilation.
    """

    group: int

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., L] → [..., L]."""
        return simnorm(x, self.group)


class VectorEncoder(nnx.Module):
    """Vector observations and task embedding → latent (reference: ``layers.enc``, ``state``)."""

    def __init__(self, config: TDMPC2Config, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.symlog_obs = config.symlog_obs
        self.mlp = NormedMLP(
            config.vector_dim + config.embedding_dim,
            [config.encoder_dim] * max(config.encoder_layers - 1, 1),
            config.latent_dim,
            out_activation=SimNorm(config.simnorm_dim),
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, obs: Observation, embedding: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[..., D], or a dict of vectors that have D entries together, and [..., E] → [..., L].

        Deterministic: ``key`` is unused, as only images are shifted.
        """
        del key
        return self.mlp(jnp.concatenate([*_vectors(obs, self.symlog_obs), embedding], axis=-1))


class ImageEncoder(nnx.Module):
    """Images → latent: random shift, convolutions without padding, SimNorm.

    Reference: ``layers.conv``, for 64×64 pixels: four convolutions whose 512 features are the latent, without linear
    layer or LayerNorm. Other sides have other convolutions (``config.picture_convolutions``); features of another size
    than the latent are mapped to it by a ReLU and a last layer of affine map, LayerNorm and SimNorm, as the vector
    encoder ends. The shift (data augmentation of Kostrikov et al. 2020) is part of the encoder, both in training and in
    acting; it is of up to 3 pixels of 64, in proportion for other sides.

    Args:
      config: for the latent.
      shape: of the images, three axes.
      dtype: of convolutions and matrix products.
      rngs: source of the initial weights.
      outputs: width and activation of the last layer; None is the latent's.
    """

    def __init__(
        self,
        config: TDMPC2Config,
        shape: tuple[int, ...],
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        *,
        outputs: tuple[int, Callable[[jax.Array], jax.Array]] | None = None,
    ):
        height, width, channels, self.channels_first = picture_layout(shape)
        self.shift = round(3 * min(height, width) / 64)
        self.map_size = math.prod(picture_features(shape))
        self.simnorm = SimNorm(config.simnorm_dim)
        layers = picture_convolutions(shape)
        inputs = [channels, *[PICTURE_CHANNELS] * (len(layers) - 1)]
        self.convs = nnx.List(_convolution(i, *layer, dtype, rngs) for i, layer in zip(inputs, layers, strict=True))
        features = PICTURE_CHANNELS * self.map_size
        if outputs is None and features != config.latent_dim:
            outputs = config.latent_dim, self.simnorm
        if outputs is not None:
            self.head = NormedLinear(features, outputs[0], activation=outputs[1], dtype=dtype, rngs=rngs)

    def __call__(self, obs: Observation, embedding: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[..., C, H, W] or [..., H, W, C] (uint8 0–255, or float 0–1), or a dict of one → [..., L].

        ``embedding`` has width 0: image models have one task. Without a key images are not shifted.
        """
        del embedding
        (obs,) = obs.values() if isinstance(obs, Mapping) else (obs,)
        x = obs.reshape(-1, *obs.shape[-3:])
        x = x.transpose(0, 2, 3, 1) if self.channels_first else x
        x = x if key is None else random_shift(x, key, self.shift)
        x = (x / jnp.float32(255) if x.dtype == jnp.uint8 else x.astype(jnp.float32)) - 0.5
        for conv in self.convs[:-1]:
            x = nnx.relu(conv(x))
        x = self._last_conv(x).astype(jnp.float32)
        # Channel-major, as PyTorch flattens: with 8 features a simplex is 8 neighbouring pixels of one channel.
        x = x.transpose(0, 3, 1, 2).reshape(*obs.shape[:-3], -1)
        return self.head(nnx.relu(x)) if hasattr(self, "head") else self.simnorm(x)

    def _last_conv(self, x: jax.Array) -> jax.Array:
        """The last convolution, without gradient to its bias where the bias cannot change the output.

        If the features are the latent, and a simplex lies within one channel, as 2, 4, 8 or 16 neighbours of a 4×4 map
        do, then the channel's bias shifts all inputs of its softmax alike, which a softmax is invariant to. The bias's
        exact gradient is then 0; the computed one is rounding noise, and Adam would scale that up to full steps.
        """
        conv = self.convs[-1]
        if conv.bias is None or self.map_size % self.simnorm.group or hasattr(self, "head"):
            return conv(x)
        x, kernel, bias = (a.astype(conv.dtype) for a in (x, conv.kernel[...], jax.lax.stop_gradient(conv.bias[...])))
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout) + bias


class JointEncoder(nnx.Module):
    """Several images, or images and vectors → latent; not in the reference, whose models observe one kind.

    Each image has an :class:`ImageEncoder`, all vectors together have an MLP like that of :class:`VectorEncoder`; each
    of these ends in ``encoder_dim`` features of the same scale (affine, LayerNorm, Mish). A last layer of affine map,
    LayerNorm and SimNorm joins them, images first, in the config's order.
    """

    def __init__(self, config: TDMPC2Config, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.image_keys, self.vector_keys, self.symlog_obs = config.image_keys, config.vector_keys, config.symlog_obs
        width = config.encoder_dim
        self.images = nnx.List(
            ImageEncoder(config, config.observations[name], dtype, rngs, outputs=(width, mish))
            for name in self.image_keys
        )
        if self.vector_keys:
            hidden = [width] * max(config.encoder_layers - 1, 1)
            self.mlp = NormedMLP(config.vector_dim, hidden, width, out_activation=mish, dtype=dtype, rngs=rngs)
        features = width * (len(self.image_keys) + bool(self.vector_keys))
        activation = SimNorm(config.simnorm_dim)
        self.head = NormedLinear(features, config.latent_dim, activation=activation, dtype=dtype, rngs=rngs)

    def __call__(self, obs: Observation, embedding: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """A dict of vectors [..., n] and images → [..., L]; each image is shifted by itself.

        ``embedding`` has width 0: image models have one task. Without a key images are not shifted.
        """
        assert isinstance(obs, Mapping)
        keys = split_key(key, len(self.image_keys))
        features = [
            encode(obs[name], embedding, key)
            for encode, name, key in zip(self.images, self.image_keys, keys, strict=True)
        ]
        if self.vector_keys:
            vectors = {name: obs[name] for name in self.vector_keys}
            features.append(self.mlp(jnp.concatenate(_vectors(vectors, self.symlog_obs), axis=-1)))
        return self.head(jnp.concatenate(features, axis=-1))


def make_encoder(config: TDMPC2Config, dtype: jnp.dtype, rngs: nnx.Rngs) -> VectorEncoder | ImageEncoder | JointEncoder:
    """The encoder of what the config observes."""
    if not config.image_keys:
        return VectorEncoder(config, dtype, rngs)
    if config.is_image:
        return ImageEncoder(config, config.observations[config.image_keys[0]], dtype, rngs)
    return JointEncoder(config, dtype, rngs)


def _vectors(obs: Observation, squash: bool) -> list[jax.Array]:
    """Vectors [..., n] as float32, in the order given; those of symlog if ``squash``."""
    arrays = [x.astype(jnp.float32) for x in (obs.values() if isinstance(obs, Mapping) else [obs])]
    return [symlog(x) for x in arrays] if squash else arrays


def _convolution(inputs: int, size: int, stride: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Conv:
    bound = (inputs * size * size) ** -0.5  # PyTorch's default: uniform in ±1 / √fan-in, for the bias too.
    init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)  # noqa: E731
    return nnx.Conv(
        inputs,
        PICTURE_CHANNELS,
        (size, size),
        strides=stride,
        padding="VALID",
        kernel_init=init,
        bias_init=init,
        dtype=dtype,
        rngs=rngs,
    )
