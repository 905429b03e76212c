"""Observations and actions as flat dicts of arrays: one name for a single array, in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OBS = "obs"
"""Name of an observation that is a single array."""

ACTION = "action"
"""Name of an action that is a single array."""


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
