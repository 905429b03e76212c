"""Comparison of trees of arrays: weights, training states, batches, episodes."""

import jax
import numpy as np


def leaves(tree):
    """Leaves as NumPy arrays by path; keys as their data."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        found[jax.tree_util.keystr(path)] = np.asarray(jax.random.key_data(leaf) if key else leaf)
    return found


def assert_same(one, other):
    """Equal trees, bit for bit, with the same shapes and dtypes."""
    one, other = leaves(one), leaves(other)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[path], err_msg=path, strict=True)


def changed(one, other):
    """The paths of the leaves that differ."""
    one, other = leaves(one), leaves(other)
    return {path for path in one.keys() & other.keys() if not np.array_equal(one[path], other[path])}
