"""Several devices: their mesh, who holds what, and arrays between the host and the mesh.

Everything goes through ``jax.sharding`` and XLA's own collectives. Algorithms know nothing of it: the trainer places
state and batches, and XLA divides the same update. Windows of a batch are divided over all devices of the mesh; weights
and optimizer state are copied along the axis ``data`` and divided along ``fsdp``. Importing starts no backend.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from worldloom.config import check, is_integer, nearest
from worldloom.errors import DeviceError

_log = logging.getLogger("worldloom")
T = TypeVar("T")
C = TypeVar("C")

AXES = ("data", "fsdp")
"""Axes of every mesh; one that a config does not name has size 1."""
SMALLEST_DIVIDED = 4096
"""Numbers in the smallest array that is divided: collecting a smaller one costs more than a copy on every device."""


# ---- the config's mesh ----------------------------------------------------------------------------------------------


def check_mesh(sizes: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` unless ``sizes`` names axes of a mesh and how many devices each has."""
    example = "such as {'data': -1} or {'data': 2, 'fsdp': 4}"
    check(isinstance(sizes, Mapping), f"mesh must be a dict, {example}, not {sizes!r}.")
    for name, size in sizes.items():
        check(name in AXES, f"mesh has no axis '{name}'.{nearest(name, AXES)} Its axes are data and fsdp, {example}.")
        check(
            is_integer(size) and (size >= 1 or size == -1),
            f"mesh['{name}'] must be a number of devices, or -1 for all that are left, not {size!r}.",
        )
    check(list(sizes.values()).count(-1) <= 1, f"mesh={dict(sizes)} has -1 twice; one axis can take what is left.")


def resolve_mesh(sizes: Mapping[str, int], devices: int) -> tuple[int, int]:
    """Devices along ``data`` and along ``fsdp`` of a mesh over at most ``devices`` devices.

    Raises ``DeviceError`` if there are too few, or if what is left cannot be divided for -1.
    """
    data, fsdp = (sizes.get(name, 1) for name in AXES)
    fixed = math.prod(size for size in (data, fsdp) if size > 0)
    needed, counted = max(fixed, 1), f"{devices} device{'s are' if devices != 1 else ' is'} there"
    if needed > devices:
        raise DeviceError(
            f"mesh={dict(sizes)} needs {needed} devices; {counted}. mesh={{'data': -1}} (--mesh data=-1) takes what is "
            "there; a run may go on over another mesh."
        )
    left = devices // needed
    if -1 in (data, fsdp) and left * needed != devices:
        raise DeviceError(f"mesh={dict(sizes)} cannot be formed: {counted}, no multiple of {needed}.")
    return (left if data == -1 else data), (left if fsdp == -1 else fsdp)


# ---- in traced code -------------------------------------------------------------------------------------------------


def row_shards() -> int:
    """Number of devices that the rows of a batch are divided over in this trace; 1 without a mesh.

    An axis of windows that was merged with an axis before it (time, say) is no longer divided evenly: XLA would collect
    the whole array on every device. Code that merges axes for the sake of one device asks this first.
    """
    return math.prod(jax.sharding.get_abstract_mesh().shape.get(axis, 1) for axis in AXES)


def interleaved(batch_size: int, parts: int) -> np.ndarray:
    """Order of a batch's windows in which every ``parts``-th belongs to the same microbatch, int64 [B].

    The microbatches of one device are successive windows; dealt out in turn, each is divided over all devices.
    """
    return np.arange(batch_size).reshape(parts, -1).T.ravel()


def weight_spec(shape: tuple[int, ...], fsdp: int) -> P:
    """How an array of weights or optimizer state is divided over ``fsdp`` devices: along its largest axis that divides.

    Arrays of fewer than :data:`SMALLEST_DIVIDED` numbers, and those without such an axis, are copied to every device.
    """
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not axes or math.prod(shape) < SMALLEST_DIVIDED:
        return P()
    largest = max(axes, key=lambda axis: shape[axis])
    return P(*[None] * largest, "fsdp")


def whole_weights(params: T) -> T:
    """``params`` as every device needs them to compute, for traced code; ``params`` themselves if none is divided.

    Their gradients are divided again as the weights are, so that each device adds up and keeps its own part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    fsdp = mesh.shape.get("fsdp", 1)
    if fsdp == 1:
        return params
    return jax.tree.map(lambda x: _whole(x, weight_spec(x.shape, fsdp)) if weight_spec(x.shape, fsdp) else x, params)


def scan_rows(step: Callable[..., tuple[C, Any]], weights: Any, carry: C, rows: Any) -> tuple[C, Any]:
    """``lax.scan`` of a step that treats every window by itself, for traced code.

    The weights' gradients are added up over the steps. On a mesh each device adds up those of its own windows, and all
    devices add theirs once, after the scan; XLA by itself does it in every step.

    Args:
      step: (weights, carry, rows of one step) → (carry, outputs of the step).
      weights: pytree of arrays that the step computes with.
      carry: arrays [B, ...].
      rows: arrays [T, B, ...].

    Returns:
      The last carry, and the outputs [T, B, ...].
    """
    # On one device the number of windows may be unknown: policies are exported for any number of environments.
    shards = row_shards()
    if shards == 1 or (windows := len(jax.tree.leaves(carry)[0])) % shards:
        return jax.lax.scan(lambda carry, rows: step(weights, carry, rows), carry, rows)

    def divided(axis: int, tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(*x.shape[:axis], shards, -1, *x.shape[axis + 1 :]), tree)

    def joined(axis: int, tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(*x.shape[:axis], windows, *x.shape[axis + 2 :]), tree)

    def copy_for_each(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(jnp.broadcast_to(x, (shards, *x.shape)), P(AXES))

    copies = jax.tree.map(copy_for_each, weights)
    last, outputs = jax.lax.scan(
        lambda carry, rows: jax.vmap(step)(copies, carry, rows), divided(0, carry), divided(1, rows)
    )
    return joined(0, last), joined(1, outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(x: jax.Array, spec: P) -> jax.Array:
    del spec
    return jax.lax.with_sharding_constraint(x, P())


def _whole_forward(x: jax.Array, spec: P) -> tuple[jax.Array, None]:
    return _whole(x, spec), None


def _whole_backward(spec: P, residuals: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, spec),)


_whole.defvjp(_whole_forward, _whole_backward)


# ---- arrays of the host on a mesh -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of a run are: on one device, or divided over a mesh. Hashable.

    Attributes:
      device: a device of this process; acting and everything outside of updates happens there.
      mesh: the mesh; None for a run on ``device`` alone.
    """

    device: jax.Device
    mesh: Mesh | None = None

    @classmethod
    def of(cls, sizes: Mapping[str, int], device: jax.Device) -> Placement:
        """The placement of a config's ``mesh``, over the devices of the platform of ``device``.

        Raises ``DeviceError`` if there are too few of them, or if several processes are to leave some out.
        """
        devices = jax.devices(device.platform)
        several = jax.process_count() > 1
        if not sizes and not several:
            return cls(device)
        sizes = sizes or {"data": -1}
        shape = resolve_mesh(sizes, len(devices))
        used, counted = math.prod(shape), len(devices)
        if used < counted and several:
            raise DeviceError(
                f"mesh={dict(sizes)} uses {used} of the {counted} devices of {jax.process_count()} processes; all of "
                "them must take part: mesh={'data': -1} takes all."
            )
        if used < counted:
            _log.info("mesh=%s uses %d of the %d devices here.", dict(sizes), used, counted)
        # The device that acts comes first: JAX's default one may be any of them.
        if not several:
            devices = sorted(devices, key=lambda each: each != device)
        types = (AxisType.Auto,) * 2  # Explicit axes, the default, refuse to sort a divided array.
        return cls(device, jax.make_mesh(shape, AXES, axis_types=types, devices=devices[:used]))

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """The context to trace and call compiled updates in."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    @property
    def shards(self) -> int:
        """Number of devices that the windows of a batch are divided over."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def spans_processes(self) -> bool:
        """Whether other processes hold a part."""
        return self.mesh is not None and jax.process_count() > 1

    def replicated(self) -> NamedSharding | None:
        """The sharding of an array that every device holds whole; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, P())

    def rows(self, axis: int = 0) -> NamedSharding | None:
        """The sharding of arrays whose windows are numbered by ``axis``; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, P(*[None] * axis, AXES))

    def weights(self, tree: Any) -> Any:
        """Shardings of weights and optimizer state, by :func:`weight_spec`; keys are whole. A mesh is needed."""
        assert self.mesh is not None
        mesh, fsdp = self.mesh, self.mesh.shape["fsdp"]
        return jax.tree.map(lambda x: NamedSharding(mesh, P() if _is_key(x) else weight_spec(x.shape, fsdp)), tree)

    def local_windows(self, batch_size: int) -> np.ndarray | None:
        """Numbers of the windows of a batch that devices of this process hold, ascending; None for all of them."""
        if not self.spans_processes:
            return None
        sharding = self.rows()
        assert sharding is not None
        slices = sharding.addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([np.arange(batch_size)[each] for each in slices if each is not None]))

    def windows(self, batch_size: int, microbatches: int) -> np.ndarray | None:
        """Windows of a batch that this process samples, in the order of its devices; None for all in their order."""
        local = self.local_windows(batch_size)
        if self.mesh is None or microbatches == 1:
            return local
        order = interleaved(batch_size, microbatches)
        return order if local is None else order[local]

    def in_order(self, arrays: T, batch_size: int, microbatches: int) -> T:
        """Arrays [K, B, ...] of an update with their windows in the order in which they were sampled."""
        if self.mesh is None or microbatches == 1 or not jax.tree.leaves(arrays):
            return arrays
        return _in_order(arrays, np.argsort(interleaved(batch_size, microbatches)))

    def check_batch(self, batch_size: int, microbatches: int) -> None:
        """Raise ``ConfigError`` unless the windows of every microbatch can be divided over the devices."""
        if self.mesh is None:
            return
        parts = f" in microbatches={microbatches}" if microbatches > 1 else ""
        check(
            batch_size % (self.shards * microbatches) == 0,
            f"batch_size={batch_size}{parts} cannot be divided evenly over {self.shards} devices; use a multiple of "
            f"{self.shards * microbatches}, or a mesh of fewer devices.",
        )

    def put_state(self, state: T) -> T:
        """Weights and optimizer state from the host, or from one device, where :meth:`weights` says."""
        if self.mesh is None:
            return jax.device_put(state, self.device)
        return jax.tree.map(self._put, state, self.weights(state))

    def put_batches(self, batches: T, batch_size: int) -> T:
        """Arrays [K, B, ...] on the devices; of several processes, each gives its :meth:`local_windows`."""
        if self.mesh is None:
            return jax.device_put(batches, self.device)
        sharding = self.rows(1)
        if not self.spans_processes:
            return jax.device_put(batches, sharding)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, x, (x.shape[0], batch_size, *x.shape[2:])),
            batches,
        )

    def _put(self, x: Any, sharding: NamedSharding) -> Any:
        there = isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim)
        if there or not self.spans_processes:
            return jax.device_put(x, sharding)
        if _is_key(x):
            data = self._put(np.asarray(jax.random.key_data(x)), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    def to_device(self, tree: T) -> T:
        """Arrays of the mesh as whole arrays on :attr:`device`; copies nothing that is there already.

        What is divided over processes is collected, which all of them must call for.
        """
        if self.mesh is None:
            return tree
        if any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
            with self.context():
                tree = _collect(self.replicated())(tree)
        return jax.tree.map(self._own_copy, tree)

    def to_host(self, tree: Any) -> Any:
        """NumPy arrays of a tree, whole. What is divided over processes is collected, one array at a time."""
        if not self.spans_processes:
            return jax.device_get(tree)
        return jax.tree.map(lambda x: np.asarray(x if x.is_fully_replicated else self.to_device(x)), tree)

    def _own_copy(self, x: jax.Array) -> jax.Array:
        return next(shard.data for shard in x.addressable_shards if shard.device == self.device)


class ActingState:
    """States of a run as acting needs them: weights and key on one device, without the optimizer's state.

    Weights that are divided are collected once for each state.
    """

    def __init__(self, placement: Placement):
        self._placement = placement
        self._state = self._copy = None

    def __call__(self, state: Any) -> Any:
        """``state`` on ``placement.device``; ``state`` itself without a mesh."""
        if self._placement.mesh is None:
            return state
        if state is not self._state:
            params, key = self._placement.to_device((state.params, state.key))
            self._state, self._copy = state, state.replace(params=params, key=key, opt_state=())
        return self._copy


@functools.lru_cache(maxsize=8)
def _collect(sharding: NamedSharding) -> Any:
    """A compiled function tree → the same arrays, whole on every device."""
    return jax.jit(lambda tree: jax.tree.map(jnp.asarray, tree), out_shardings=sharding)


@jax.jit
def _in_order(arrays: Any, order: jax.Array) -> Any:
    return jax.tree.map(lambda x: x[:, order], arrays)


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
