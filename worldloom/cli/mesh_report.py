"""What a mesh holds and moves: memory per device, and the collectives of a compiled update."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from worldloom.errors import DeviceError
from worldloom.sharding import Placement, resolve_mesh, weight_spec
from worldloom.training.config import TrainingConfig
from worldloom.training.update_loop import CompiledUpdate, Learner, NonFiniteGuard

_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


def mesh_shape(mesh: Mapping[str, int]) -> tuple[int, int]:
    """Devices along ``data`` and ``fsdp``; a mesh without -1 may be larger than this machine."""
    named = math.prod(mesh.values())
    return resolve_mesh(mesh, named if named > 0 else len(jax.devices()))


def bytes_per_device(tree: Any, fsdp: int) -> int:
    """Bytes of weights or optimizer state (or of their shapes) that one device holds."""
    sizes = []
    for leaf in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        parts = fsdp if weight_spec(leaf.shape, fsdp) else 1
        sizes.append(math.prod(leaf.shape) * leaf.dtype.itemsize // parts)
    return sum(sizes)


def divided_share(tree: Any, fsdp: int) -> float:
    """Share of the numbers of ``tree`` that are divided along ``fsdp``; the others are copied to every device."""
    leaves = jax.tree.leaves(tree)
    divided = sum(math.prod(leaf.shape) for leaf in leaves if weight_spec(leaf.shape, fsdp))
    return divided / max(sum(math.prod(leaf.shape) for leaf in leaves), 1)


def use_virtual_devices(count: int) -> None:
    """Let JAX divide this machine's CPU into ``count`` devices, to compile for a mesh that is not there.

    Raises ``DeviceError`` if JAX has already counted its devices and has fewer.
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        if len(jax.devices()) < count:
            raise DeviceError(
                f"JAX already runs with {len(jax.devices())} devices in this process; {count} are needed. Start a new "
                "process."
            ) from None


def compile_on_mesh(algorithm: Any, model_class: Any, config: Any, training: TrainingConfig, batch: Any) -> Any:
    """The compiled update of ``batch``, shapes [B, T, ...], on the mesh of ``training``; nothing is allocated."""
    placement = Placement.of(training.mesh, jax.local_devices()[0])
    assert placement.mesh is not None
    settings = training.of_update()
    update = algorithm.make_update(config, settings, model_class=model_class)
    keeps, dtype = bool(batch.get("context")), settings.latent_dtype
    call = CompiledUpdate(update, algorithm.loss_terms, False, keeps, True, placement, dtype)
    state = jax.eval_shape(lambda key: algorithm.init_state(model_class(config), settings, key), jax.random.key(0))
    guard = jax.eval_shape(NonFiniteGuard.create)
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype, sharding=placement.rows(1)), batch)
    learner = Learner(_placed(state, placement.weights(state)), _placed(guard, placement.weights(guard)))
    return call.lower(learner, rows).compile()


def collectives(text: str) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """dtype and shape of every array that a compiled program (its HLO text) moves between devices, by kind."""
    moved = collections.defaultdict(list)
    for shapes, kind in re.findall(rf" = (.*?) ({_KINDS})(?:-start)?\(", text):
        for dtype, sides in re.findall(r"([a-z]+[0-9]*)\[([0-9,]*)\]", shapes):
            moved[kind].append((dtype, tuple(int(side) for side in sides.split(",") if side)))
    return dict(moved)


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes of the arrays of :func:`collectives`, by kind. A loop's body counts once."""
    return {
        kind: sum(_BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in arrays)
        for kind, arrays in collectives(text).items()
    }


def link_bytes(moved: Mapping[str, int], devices: int) -> float:
    """Bytes that each device sends with ring algorithms: 2 (n − 1) / n of an all-reduce, half of that of all else."""
    once = (devices - 1) / devices
    return sum((2 * once if kind == "all-reduce" else once) * size for kind, size in moved.items())


def link_lines(moved: Mapping[str, int], devices: int, megabytes: Any) -> Iterator[str]:
    """Lines with what a compiled update moves between devices."""
    for kind, size in sorted(moved.items()):
        yield f"  {kind:16} {megabytes(size):>13}"
    yield f"  {'sent by each':16} {megabytes(round(link_bytes(moved, devices))):>13}  with ring algorithms"


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
