"""Several runs as one: their arrays along a first axis of members, which may be divided over devices.

The axis has a name of its own, not the name of a mesh's axis of windows: to the update of a member, which asks how its
windows are divided, there is one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MEMBERS = "members"
"""The axis of the mesh that members are divided over."""


def mesh_of(devices: Sequence[jax.Device]) -> Mesh | None:
    """The mesh of ``devices``; None if there are none, where everything stays on one device."""
    return Mesh(np.array(devices), (MEMBERS,)) if devices else None


def homes_of(count: int, devices: Sequence[jax.Device]) -> list[jax.Device]:
    """The device of each of ``count`` members, a multiple of the devices: successive members are together."""
    return [devices[index * len(devices) // count] for index in range(count)]


def stack(trees: Sequence[Any], mesh: Mesh | None) -> Any:
    """The arrays of all members as arrays [members, ...]; on a mesh, each member's on its device alone."""
    if mesh is None:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    count, devices = len(trees), list(mesh.devices.flat)
    homes, sharding = homes_of(count, devices), NamedSharding(mesh, P(MEMBERS))
    parts = []
    for device in devices:
        here = [tree for tree, home in zip(trees, homes, strict=True) if home == device]
        parts.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *jax.device_put(here, device)))
    return jax.tree.map(
        lambda *arrays: jax.make_array_from_single_device_arrays(
            (count, *arrays[0].shape[1:]), sharding, list(arrays), dtype=arrays[0].dtype
        ),
        *parts,
    )


def member(tree: Any, index: int, mesh: Mesh | None) -> Any:
    """The arrays of member ``index`` of :func:`stack`, on the device where they are."""
    if mesh is None:
        return _cut(tree, index)
    # Cut out of the whole array, they would be collected from all devices first.
    each = jax.tree.leaves(tree)[0].shape[0] // mesh.size
    device, place = divmod(index, each)
    return _cut(jax.tree.map(lambda leaf: leaf.addressable_data(device), tree), place)


@jax.jit
def _cut(tree: Any, index: Any) -> Any:
    """Entry ``index`` of all arrays, in one call."""
    return jax.tree.map(lambda leaf: leaf[index], tree)
