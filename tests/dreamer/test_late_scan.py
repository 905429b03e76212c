"""The scan with late gradients against `lax.scan`: the same values and, to rounding, the same gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldloom.nn.late import Products, late_scan

T, B, D, BLOCKS = 7, 3, 8, 2


def step(weights, products, carry, row, key):
    noise = 0.0 if key is None else jax.random.normal(key, carry.shape)
    hidden = jnp.tanh(products("dense", carry) + row + weights["bias"])
    own = products("own", hidden)
    gate, candidate = products("gates", jax.nn.silu(own), 2)
    carry = jax.nn.sigmoid(gate) * jnp.tanh(candidate) + weights["decay"] * carry
    return carry, {"carry": carry, "noisy": hidden[..., :2] + noise[..., :2] if key is not None else hidden}


def plain(weights, kernels, initial, rows, keys):
    one = lambda carry, now: step(weights, Products(kernels), carry, *now)  # noqa: E731
    return jax.lax.scan(one, initial, (rows, keys))


def arguments(dtype=jnp.float32):
    draw = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(0.5 * draw.normal(size=shape), dtype)  # noqa: E731
    kernels = {"dense": array(D, D), "own": array(BLOCKS, D // 2, D // 2), "gates": array(BLOCKS, D // 2, D)}
    return {"bias": array(D), "decay": array()}, kernels, array(B, D), array(T, B, D)


def value(scan, keys, weights, kernels, initial, rows):
    carry, out = scan(weights, kernels, initial, rows, keys)
    return jnp.sum(jnp.sin(carry)) + sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(out))


late = functools.partial(late_scan, step)


@pytest.mark.parametrize("drawn", [False, True])
def test_values_and_gradients_are_those_of_a_scan(drawn):
    keys = jax.random.split(jax.random.key(0), T) if drawn else None
    for one, other in zip(
        jax.tree.leaves(late(*arguments(), keys)), jax.tree.leaves(plain(*arguments(), keys)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    found, expected = (
        jax.jit(jax.grad(functools.partial(value, scan, keys), argnums=(0, 1, 2, 3)))(*arguments())
        for scan in (late, plain)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), found, expected)


def test_half_precision_is_added_up_at_once():
    """The gradient of a kernel from 200 steps in bfloat16: a sum carried along in it would stand still."""
    weights, kernels, initial, _ = arguments(jnp.bfloat16)
    rows = 0.1 * jnp.ones((200, B, D), jnp.bfloat16)
    grad = lambda scan, *args: jax.jit(jax.grad(functools.partial(value, scan, None), argnums=1))(*args)  # noqa: E731
    exact = grad(plain, *jax.tree.map(lambda x: x.astype(jnp.float32), (weights, kernels, initial, rows)))
    error = lambda found: max(  # noqa: E731
        float(jnp.abs(found[name].astype(jnp.float32) - exact[name]).max() / jnp.abs(exact[name]).max())
        for name in exact
    )
    ours, carried = (error(grad(scan, weights, kernels, initial, rows)) for scan in (late, plain))
    assert ours < carried


def test_the_loop_backwards_makes_no_gradient_of_a_kernel():
    """Nothing of a kernel's shape is carried."""
    program = jax.make_jaxpr(jax.grad(functools.partial(value, late, None), argnums=1))(*arguments())
    loops = [e for e in program.eqns if e.primitive.name == "scan"]
    carried = [v.aval.shape for e in loops for v in e.outvars[: e.params["num_carry"]]]
    assert len(loops) == 2
    assert (BLOCKS, D // 2, D) not in carried
    assert (D, D) not in carried
