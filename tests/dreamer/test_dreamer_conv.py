"""Convolutions over squares equal a convolution with a pool or an upsampling, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from worldloom.nn.conv import Conv, depth_to_space
from worldloom.xla_workarounds import convolves_faster_in_squares

CASES = pytest.mark.parametrize(
    ("kernel", "channels", "outputs", "height", "width"),
    [(5, 3, 4, 8, 12), (5, 17, 3, 6, 4), (3, 2, 5, 4, 4), (7, 3, 2, 10, 8), (1, 2, 3, 4, 6)],
)


def convolved(conv, x):
    """XLA's convolution, without any of the library's tricks."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, conv.kernel[...], (1, 1), "SAME", dimension_numbers=layout) + conv.bias


def compare(plain, fast, conv, x):
    """Two functions of one convolution agree in values and in gradients of weights and input."""
    graph, params = nnx.split(conv)

    def both(way):
        def total(params, x):
            y = way(nnx.merge(graph, params), x)
            return jnp.sum(jnp.sin(3 * y)), y

        (_, y), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x)
        return y, gradients

    for ours, expected in zip(jax.tree.leaves(both(fast)), jax.tree.leaves(both(plain)), strict=True):
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_both_forms_of_the_pooled_convolution_are_compared():
    assert {convolves_faster_in_squares(channels) for channels in (3, 17)} == {True, False}


def test_gradients_of_many_images_are_those_of_xla():
    conv = Conv(2, 3, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (150, 4, 6, 2))
    compare(convolved, lambda conv, x: conv(x), conv, x)


@CASES
def test_conv_pool_is_convolution_then_pool(kernel, channels, outputs, height, width):
    conv = Conv(channels, outputs, kernel=kernel, rngs=nnx.Rngs(0))
    conv.bias[...] = jnp.arange(outputs) / 7
    x = jax.random.normal(jax.random.key(1), (2, height, width, channels))

    def plain(conv, x):
        y = convolved(conv, x)
        return y.reshape(2, height // 2, 2, width // 2, 2, outputs).max((2, 4))

    compare(plain, lambda conv, x: conv.conv_pool(x), conv, x)


@CASES
def test_upsample_conv_is_upsampling_then_convolution(kernel, channels, outputs, height, width):
    conv = Conv(channels, outputs, kernel=kernel, rngs=nnx.Rngs(0))
    conv.bias[...] = jnp.arange(outputs) / 7
    x = jax.random.normal(jax.random.key(1), (2, height, width, channels))

    def plain(conv, x):
        return convolved(conv, x.repeat(2, 1).repeat(2, 2))

    compare(plain, lambda conv, x: depth_to_space(conv.upsample_conv(x)), conv, x)
