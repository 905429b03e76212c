"""The single arrays of nested Gymnasium spaces and of values in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from worldloom.errors import ConfigError, DataError

Arrays = np.ndarray | dict[str, np.ndarray]
"""One array, or a dict of arrays where the space is a dict or a tuple."""

Path = tuple[Any, ...]
"""Keys of dicts and indices of tuples that lead to a leaf."""


def space_leaves(space: spaces.Space[Any], path: Path = ()) -> Iterator[tuple[Path, spaces.Space[Any]]]:
    """The spaces inside nested ``Dict`` and ``Tuple`` spaces that are neither, with their paths, in order.

    Raises ``ConfigError`` for a key that is an empty text.
    """
    if not isinstance(space, spaces.Dict | spaces.Tuple):
        yield path, space
        return
    for key, inner in members(space):
        if str(key) == "":
            raise ConfigError(f"A key of {space} is the empty text; name it, in a wrapper for example.")
        yield from space_leaves(inner, (*path, key))


def members(space: spaces.Dict | spaces.Tuple) -> list[tuple[Any, spaces.Space[Any]]]:
    """Keys of a dict, or indices of a tuple, each with its space."""
    return list(space.spaces.items()) if isinstance(space, spaces.Dict) else list(enumerate(space.spaces))


def leaf_name(path: Path, single: str) -> str:
    """The parts of ``path`` joined with ``/``: ``robot/arm``, ``0`` for the first entry of a tuple."""
    return "/".join(map(str, path)) or single


def value_at(value: Any, path: Path, what: str) -> Any:
    """The entry at ``path`` in nested dicts and tuples; ``what`` says of what, in errors.

    Raises ``DataError`` where an entry is missing.
    """
    for key in path:
        try:
            # A tuple of which entries were dropped is a dict whose keys are the numbers that entries had.
            value = value[int(key)] if isinstance(value, tuple) else value[key]
        except (KeyError, IndexError, TypeError, ValueError):
            raise DataError(
                f"The {what} has no '{leaf_name(path, '')}': where '{key}' should be, there is {describe(value)}."
            ) from None
    return value


def as_numbers(value: Any, name: str, what: str) -> np.ndarray:
    """``value`` as an array of numbers. Raises ``DataError`` for dicts, texts, objects and uneven sequences."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return value
    if isinstance(value, Mapping):
        raise DataError(f"The {what} '{name}' is a dict; its space is a single array.")
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # Sequences of different lengths, other libraries' arrays.
        raise DataError(f"The {what} '{name}' is no array of numbers: {error}.") from None
    if array.dtype.name == "bfloat16":  # of no kind that NumPy knows
        return array.astype(np.float32)
    if array.dtype.kind not in "fiub":
        raise DataError(f"The {what} '{name}' is {describe(value)} (dtype {array.dtype}); real numbers are needed.")
    return array


def describe(value: Any) -> str:
    """What a value is, for messages: keys of dicts, values of short ones, else the type."""
    if isinstance(value, Mapping):
        return f"a dict of {sorted(map(str, value))}"
    kind = type(value).__name__
    if isinstance(value, tuple | list):
        return f"a {kind} of {len(value)} entries"
    if isinstance(value, np.ndarray) and value.size > 8:
        return f"an array of shape {value.shape}"
    return f"{value!r:.60} ({kind})"


def check_names(names: list[str], what: str) -> None:
    """Raise ``ConfigError`` if two leaves of a space have the same name."""
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Two {what} of the space would be called '{name}'; rename one in a wrapper.")
