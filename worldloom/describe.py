"""Short texts for ``repr``: shapes instead of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

_MOST = 6
"""Entries of a dict that are named one by one."""


def described(value: Any) -> str:
    """An array as ``float32[4, 8]``, a dict of a few arrays entry by entry, any larger tree by its counts."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    is_flat = isinstance(value, Mapping) and not any(isinstance(each, Mapping) for each in value.values())
    if is_flat and len(value) <= _MOST:
        return f"{{{', '.join(f'{name}: {described(each)}' for name, each in value.items())}}}"
    leaves = jax.tree.leaves(value)
    if leaves and all(hasattr(leaf, "shape") for leaf in leaves):
        numbers = sum(math.prod(leaf.shape) for leaf in leaves)
        return f"{numbers:,} numbers in {len(leaves):,} array{'s' if len(leaves) > 1 else ''}"
    return repr(value)


def described_fields(record: Any) -> str:
    """The ``repr`` of a dataclass or ``NamedTuple`` with :func:`described` fields."""
    names = getattr(record, "_fields", None) or getattr(record, "__dataclass_fields__", {})
    values = {name: getattr(record, name) for name in names}
    fields = (f"{name}={v!r}" if isinstance(v, ShortRepr) else f"{name}={described(v)}" for name, v in values.items())
    return f"{type(record).__name__}({', '.join(fields)})"


class ShortRepr:
    """Base of dataclasses with :func:`described_fields` as their ``repr``."""

    def __repr__(self) -> str:
        return described_fields(self)
