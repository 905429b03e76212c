"""Encoder, decoder, heads and actor: the networks around the recurrent state-space model.

Their counterparts in danijar/dreamerv3 are ``Encoder`` and ``Decoder`` of ``dreamerv3/rssm.py``, and ``MLPHead`` of
``embodied/jax/heads.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from worldloom.models.base import Statistic
from worldloom.models.dreamer.config import DreamerV3Config
from worldloom.models.dreamer.rssm import Latent
from worldloom.nn.conv import Conv, ConvDown, ConvUp, depth_to_space
from worldloom.nn.linear import MLP, BlockLinear, Dense, Linear, RMSNorm
from worldloom.ops.distributions import Categorical, Normal
from worldloom.ops.symlog import symlog
from worldloom.spaces import attribute_name, name_of_attribute


class Encoder(nnx.Module):
    """Observations → tokens [..., E]: symlog and an MLP for vectors, convolutions for images.

    Several vectors are joined in sorted order of their names, several images on their channels; tokens are the
    vector's features followed by the images'. ``output_dim`` is E.
    """

    def __init__(self, config: DreamerV3Config, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.dtype = dtype
        self.vector_keys = tuple(sorted(config.vector_keys))
        self.image_keys = tuple(sorted(config.image_keys))
        self.output_dim = 0
        if self.vector_keys:
            inputs = sum(math.prod(config.observations[name]) for name in self.vector_keys)
            self.mlp = MLP(inputs, config.width, config.mlp_layers, rngs=rngs)
            self.output_dim += config.width
        if self.image_keys:
            layouts = [config.image_layout(name) for name in self.image_keys]
            widths = [sum(layout.channels for layout in layouts), *config.image_channels]
            self.cnn = nnx.List([ConvDown(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])
            self.padding = _padding(config)
            self.output_dim += math.prod(_map_sides(config)) * widths[-1]

    def __call__(self, obs: Mapping[str, jax.Array]) -> jax.Array:
        """``obs`` holds vectors [..., n] and images [..., H, W, C] (uint8, or float from 0 to 1) by name."""
        tokens = []
        # Vectors: symlog, one MLP for all.
        if self.vector_keys:
            squashed = [symlog(obs[name].astype(jnp.float32)).astype(self.dtype) for name in self.vector_keys]
            tokens.append(self.mlp(jnp.concatenate(squashed, -1)))
        # Images: centred on 0, joined on their channels, padded with 0 as convolutions are, levels of convolutions.
        if self.image_keys:
            images = [unit_range(obs[name], self.dtype) for name in self.image_keys]
            x = jnp.concatenate(images, -1) - 0.5
            batch = x.shape[:-3]
            x = x.reshape(-1, *x.shape[-3:])
            x = jnp.pad(x, ((0, 0), *self.padding, (0, 0))) if any(map(any, self.padding)) else x
            for level in self.cnn:
                x = level(x)
            tokens.append(x.reshape(*batch, -1))
        return jnp.concatenate(tokens, -1)


class ImageDecoder(nnx.Module):
    """Latent → images [..., H, W, Σ channels] from 0 to 1.

    A small map [H/16, W/16, channels] is the sum of a block-diagonal layer of h (``sp0``) and an MLP of z (``sp1``,
    ``sp2``); four upsampling convolutions enlarge it, or fewer for small images. What the encoder pads is cut off.
    """

    def __init__(self, config: DreamerV3Config, *, rngs: nnx.Rngs):
        layouts = [config.image_layout(name) for name in config.image_keys]
        height, width = _map_sides(config)
        widths = config.image_channels[::-1]
        self.padding = _padding(config)
        self.blocks, self.map_shape = config.blocks, (height, width, widths[0])
        size = math.prod(self.map_shape)
        self.from_deter = BlockLinear(config.deter_dim, size, config.blocks, rngs=rngs)
        self.stoch_hidden = Dense(config.stoch_dim, 2 * config.width, rngs=rngs)
        self.from_stoch = Linear(2 * config.width, size, rngs=rngs)
        self.norm = RMSNorm(widths[0])
        self.cnn = nnx.List([ConvUp(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])
        self.output = Conv(widths[-1], sum(layout.channels for layout in layouts), rngs=rngs)

    def __call__(self, state: Latent) -> jax.Array:
        """Images [..., H, W, Σ channels] of states [...]."""
        height, width, channels = self.map_shape
        batch = state.deter.shape[:-1]
        # h: each block makes a map of its own, [g, h, w, c]; the blocks become channel groups of one map.
        deter = self.from_deter(state.deter).reshape(-1, self.blocks, height, width, channels // self.blocks)
        deter = jnp.moveaxis(deter, 1, 3).reshape(-1, height, width, channels)
        # z: one MLP.
        stoch = self.from_stoch(self.stoch_hidden(state.flat_stoch)).reshape(-1, height, width, channels)
        x = jax.nn.silu(self.norm(deter + stoch))
        # All levels but the last with norm and activation, the last with a sigmoid alone.
        for level in self.cnn:
            x = level(x)
        x = depth_to_space(jax.nn.sigmoid(self.output.upsample_conv(x)))
        (top, bottom), (left, right) = self.padding
        x = x[:, top : x.shape[1] - bottom, left : x.shape[2] - right]
        return x.reshape(*batch, *x.shape[1:])


class Decoder(nnx.Module):
    """Latent → observations by name: vectors in symlog space, images [..., H, W, C] from 0 to 1."""

    def __init__(self, config: DreamerV3Config, *, rngs: nnx.Rngs):
        # Pairs of weight name and observation name, which differ for a single observation.
        self.vector_names = tuple((config.weight_name(name), name) for name in config.vector_keys)
        sizes = {weight: math.prod(config.observations[name]) for weight, name in self.vector_names}
        self.image_channels = tuple((name, config.image_layout(name)[2]) for name in config.image_keys)
        if sizes:
            self.mlp = MLP(config.feature_dim, config.width, config.mlp_layers, rngs=rngs)
            self.vectors = nnx.Dict({name: Linear(config.width, size, rngs=rngs) for name, size in sizes.items()})
        if self.image_channels:
            self.image = ImageDecoder(config, rngs=rngs)

    def __call__(self, state: Latent) -> dict[str, jax.Array]:
        """Observations [..., n] and [..., H, W, C] of states [...], float32."""
        decoded: dict[str, jax.Array] = {}
        if self.vector_names:
            # Stochastic part first: the opposite of ``features``, as in the reference program.
            x = self.mlp(jnp.concatenate([state.flat_stoch, state.deter], -1))
            names = dict(self.vector_names)
            decoded |= {names[weight]: output(x).astype(jnp.float32) for weight, output in self.vectors.items()}
        if self.image_channels:
            # One array of all images, cut along its channels.
            ends = [sum(c for _, c in self.image_channels[: i + 1]) for i in range(len(self.image_channels) - 1)]
            images = jnp.split(self.image(state).astype(jnp.float32), ends, -1)
            decoded |= {name: image for (name, _), image in zip(self.image_channels, images, strict=True)}
        return decoded


class Head(nnx.Module):
    """An MLP with one linear output, [..., F] → float32 [..., outputs].

    ``scale`` 0 makes the first predictions exactly uniform, whose two-hot mean is exactly 0.
    """

    def __init__(self, config: DreamerV3Config, layers: int, outputs: int, *, scale: float = 1.0, rngs: nnx.Rngs):
        self.mlp = MLP(config.feature_dim, config.width, layers, rngs=rngs)
        self.output = Linear(config.width, outputs, scale=scale, rngs=rngs)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Raw outputs [..., outputs], float32."""
        return self.output(self.mlp(features)).astype(jnp.float32)


class GaussianOutput(nnx.Module):
    """Output layers of one continuous action."""

    def __init__(self, config: DreamerV3Config, dim: int, *, rngs: nnx.Rngs):
        self.mean = Linear(config.width, dim, scale=0.01, rngs=rngs)
        self.stddev = Linear(config.width, dim, scale=0.01, rngs=rngs)
        self.min_std, self.max_std = config.min_std, config.max_std

    def __call__(self, x: jax.Array) -> Normal:
        """Distribution over [..., dim] from the actor's hidden units [..., U]."""
        return Normal.bounded(self.mean(x), self.stddev(x), self.min_std, self.max_std)


class CategoricalOutput(nnx.Module):
    """Output layer of one discrete action."""

    def __init__(self, config: DreamerV3Config, dim: int, *, rngs: nnx.Rngs):
        self.logits = Linear(config.width, dim, scale=0.01, rngs=rngs)

    def __call__(self, x: jax.Array) -> Categorical:
        """Distribution over ``dim`` choices from the actor's hidden units [..., U]."""
        return Categorical.from_logits(self.logits(x))


class Actor(nnx.Module):
    """The policy: features [..., F] → one distribution per action."""

    def __init__(self, config: DreamerV3Config, *, rngs: nnx.Rngs):
        self.mlp = MLP(config.feature_dim, config.width, config.mlp_layers, rngs=rngs)
        self.outputs = nnx.Dict(
            {
                attribute_name(name): (CategoricalOutput if space.discrete else GaussianOutput)(
                    config, space.dim, rngs=rngs
                )
                for name, space in config.actions.items()
            }
        )

    def __call__(self, features: jax.Array) -> dict[str, Normal | Categorical]:
        """The distribution of each action by name."""
        return self.after_first_matmul(self.first_matmul(features))

    def first_matmul(self, features: jax.Array, known: jax.Array | None = None) -> jax.Array:
        """The first layer's product with its kernel, [..., F] → [..., U]; ``known`` as in ``Linear.matmul``.

        Imagination keeps it, so that the loss does not compute the actor's largest product a second time.
        """
        return self.mlp.first_matmul(features, known)

    def after_first_matmul(self, product: jax.Array) -> dict[str, Normal | Categorical]:
        """Everything that follows :meth:`first_matmul`: [..., U] → the distribution of each action."""
        x = self.mlp.after_first_matmul(product)
        return {name_of_attribute(name): output(x) for name, output in self.outputs.items()}


class ReturnRange(nnx.Module):
    """Moving 5th and 95th percentile of imagined returns, from 0 and without bias correction (``retnorm``)."""

    def __init__(self) -> None:
        self.lo = Statistic(jnp.zeros(()))
        self.hi = Statistic(jnp.zeros(()))


def _map_sides(config: DreamerV3Config) -> tuple[int, int]:
    """Height and width of the smallest feature map."""
    height, width = (side // 2 ** len(config.image_channels) for side in config.padded_sides)
    return height, width


def _padding(config: DreamerV3Config) -> tuple[tuple[int, int], tuple[int, int]]:
    """Pixels above and below, left and right of an image that make up :attr:`DreamerV3Config.padded_sides`."""
    missing = [
        padded - side
        for padded, side in zip(config.padded_sides, config.image_layout(config.image_keys[0])[:2], strict=True)
    ]
    vertical, horizontal = ((pixels // 2, pixels - pixels // 2) for pixels in missing)
    return vertical, horizontal


def unit_range(image: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Images from 0 to 1 in ``dtype``: uint8 values are divided by 255, floats are in that range already."""
    return image.astype(dtype) / 255 if image.dtype == jnp.uint8 else image.astype(dtype)
