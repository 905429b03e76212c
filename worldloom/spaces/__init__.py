"""The one translation of spaces and values: observations and actions as flat dicts of arrays, in every layer.

Here are the names; :mod:`~worldloom.spaces.observations` and :mod:`~worldloom.spaces.actions` translate what Gymnasium
spaces describe, for environments, datasets and policies; :mod:`~worldloom.spaces.narrow` leaves out parts of a space.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

OBS = "obs"
"""Name of an observation that is a single array."""

ACTION = "action"
"""Name of an action that is a single array."""

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_RESERVED = frozenset({"items", *dir(type("Plain", (), {}))})
"""Attributes that a container of modules needs for itself."""
_RESERVED_PREFIXES = ("_pytree__", "_object__")


def named(value: Any, single: str) -> dict[str, Any]:
    """A mapping as a dict; anything else as ``{single: value}``."""
    return dict(value) if isinstance(value, Mapping) else {single: value}


def unnamed(values: Mapping[str, Any], is_mapping: bool) -> Any:
    """Inverse of :func:`named`: the dict if the caller's form was a mapping, else its only entry."""
    if is_mapping:
        return dict(values)
    (value,) = values.values()
    return value


def mapping_keys(value: Any) -> list[str] | None:
    """The keys of a mapping, or None for a single array."""
    return list(value) if isinstance(value, Mapping) else None


def attribute_name(name: str) -> str:
    """``name`` as part of the names of weights and of files, where dots, slashes and digits have other meanings.

    Names of letters, digits, ``_`` and ``-`` stay as they are. Other characters, a digit at the beginning and the first
    character of a name that Python or Flax needs for itself become ``%XX``, as in URLs; different names stay different.
    """
    if _PLAIN.fullmatch(name) and name not in _RESERVED and not name.startswith(_RESERVED_PREFIXES):
        return name
    # `quote` keeps letters, digits, `_.-~`; of these, dots separate the parts of a weight's name.
    quoted = urllib.parse.quote(name, safe="").replace(".", "%2E").replace("~", "%7E")
    return quoted if quoted.startswith("%") or not _must_begin_otherwise(name) else f"%{ord(name[0]):02X}{quoted[1:]}"


def name_of_attribute(attribute: str) -> str:
    """Inverse of :func:`attribute_name`."""
    return urllib.parse.unquote(attribute)


def _must_begin_otherwise(name: str) -> bool:
    return not re.match("[A-Za-z_]", name) or name in _RESERVED or name.startswith(_RESERVED_PREFIXES)
