"""Parts of a space: observations without some of their keys, actions with narrower bounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from worldloom.config import check, is_number, nearest
from worldloom.errors import ConfigError
from worldloom.spaces import OBS
from worldloom.spaces.leaves import Path, leaf_name, members, space_leaves


def check_action_bounds(bounds: Any) -> tuple[float, float] | None:
    """``action_bounds`` as two floats, or None. Raises ``ConfigError`` unless they are two numbers, low below high."""
    if bounds is None:
        return None
    pair = bounds.tolist() if isinstance(bounds, np.ndarray) else bounds
    fits = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2 and all(map(is_number, pair))
    check(fits, f"action_bounds must be two numbers (low, high), such as (-2, 2), not {bounds!r}.")
    low, high = float(pair[0]), float(pair[1])
    check(bool(np.isfinite([low, high]).all()) and low < high, f"action_bounds={bounds!r}: low must be below high.")
    return low, high


def bound_actions(space: spaces.Space[Any], bounds: tuple[float, float] | None) -> spaces.Space[Any]:
    """``space`` with every ``Box`` in it cut to ``bounds``: what lies in both; None changes nothing.

    Raises ``ConfigError`` if a dimension has nothing in both, or if there is no ``Box``.
    """
    if bounds is None:
        return space
    if not any(isinstance(inner, spaces.Box) for _, inner in space_leaves(space)):
        raise ConfigError(f"action_bounds={bounds} are for continuous actions; the action space is {space}.")
    return _bounded(space, bounds, ())


def _bounded(space: spaces.Space[Any], bounds: tuple[float, float], path: Path) -> spaces.Space[Any]:
    if isinstance(space, spaces.Dict):
        # From pairs: Gymnasium sorts the keys of a mapping, and the order of names counts in a config.
        return spaces.Dict([(key, _bounded(inner, bounds, (*path, key))) for key, inner in members(space)])
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple([_bounded(inner, bounds, (*path, key)) for key, inner in members(space)])
    if not isinstance(space, spaces.Box):
        return space
    low, high = (
        np.maximum(space.low.astype(np.float64), bounds[0]),
        np.minimum(space.high.astype(np.float64), bounds[1]),
    )
    if np.dtype(space.dtype).kind in "iu":
        low, high = np.ceil(low), np.floor(high)
    if (low > high).any():
        where = np.argwhere(low > high)[0]
        given = (space.low[tuple(where)], space.high[tuple(where)])
        raise ConfigError(
            f"action_bounds={bounds} leave nothing of the action '{leaf_name(path, 'action')}', which lies in "
            f"[{given[0]:g}, {given[1]:g}]."
        )
    return spaces.Box(low.astype(space.dtype), high.astype(space.dtype), space.shape, space.dtype)  # type: ignore[arg-type]


def check_drop_keys(keys: Any) -> tuple[str, ...]:
    """``drop_keys`` as a tuple of names; one text is one name. Raises ``ConfigError`` for anything else."""
    if keys is None:
        return ()
    given = (keys,) if isinstance(keys, str) else tuple(keys) if isinstance(keys, Iterable) else (keys,)
    check(all(isinstance(key, str) for key in given), f"drop_keys must be names of observations, not {keys!r}.")
    return given


def drop_observations(space: spaces.Space[Any], keys: Sequence[str]) -> spaces.Space[Any]:
    """``space`` without the entries named by ``keys``, as ``robot/arm``, or ``robot`` for all in it.

    Raises ``ConfigError`` for a name that there is not, and if nothing is left.
    """
    if not keys:
        return space
    left = {leaf_name(path, OBS) for path, _ in space_leaves(space)}
    for key in keys:
        check(
            any(name == key or name.startswith(f"{key}/") for name in left),
            f"drop_keys names '{key}', which the observation space does not have.{nearest(key, left)} It has "
            f"{', '.join(sorted(left))}.",
        )
    narrowed = _without(space, frozenset(keys), ())
    if narrowed is None:
        raise ConfigError(f"drop_keys={list(keys)} leave nothing of the observation; it has {', '.join(sorted(left))}.")
    return narrowed


def _without(space: spaces.Space[Any], keys: frozenset[str], path: Path) -> spaces.Space[Any] | None:
    if leaf_name(path, OBS) in keys:
        return None
    if not isinstance(space, spaces.Dict | spaces.Tuple):
        return space
    inner = [(key, _without(inner, keys, (*path, key))) for key, inner in members(space)]
    kept = [(key, each) for key, each in inner if each is not None]
    # The entries of a tuple keep their numbers as names.
    return spaces.Dict([(str(key), each) for key, each in kept]) if kept else None


def drop_entries(obs: Any, keys: frozenset[str], path: Path = ()) -> Any:
    """An observation without the entries that :func:`drop_observations` leaves out of its space."""
    if not isinstance(obs, Mapping | tuple):
        return obs
    entries: Iterable[tuple[Any, Any]] = obs.items() if isinstance(obs, Mapping) else enumerate(obs)
    kept = {
        str(key): drop_entries(value, keys, (*path, key))
        for key, value in entries
        if leaf_name((*path, key), OBS) not in keys
    }
    return {key: value for key, value in kept.items() if not (isinstance(value, dict) and not value)}
