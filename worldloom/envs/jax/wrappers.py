"""Wrappers of other JAX packages around their environments: which are taken off, and what they must not change."""

from __future__ import annotations

import math
from typing import Any

from worldloom.config import check, is_integer

_TAKEN_OFF = (
    *("AutoResetWrapper", "BraxAutoResetWrapper", "EpisodeWrapper", "EvalWrapper", "VmapWrapper"),  # brax, playground
    "VmapAutoResetWrapper",  # jumanji, which has three of the others too
    *("LogWrapper", "FlattenObservationWrapper"),  # gymnax
)
"""Wrappers of the packages that do what is done outside of an adapted environment."""
_BATCHED = ("DomainRandomizationVmapWrapper", "BraxDomainRandomizationVmapWrapper", "MadronaWrapper")
"""Wrappers without which the environment would be another one, and which step several at a time."""


def inner(env: Any) -> Any:
    """What the wrapper ``env`` wraps; None if it is none."""
    own = getattr(env, "__dict__", {})
    return next((own[n] for n in ("env", "_env") if hasattr(own.get(n), "step")), None)


def take_off(env: Any) -> tuple[Any, list[Any]]:
    """The environment below the wrappers in ``_TAKEN_OFF`` that are on top of it, and these wrappers.

    Raises ``ConfigError`` if there are more of them under another wrapper, which would see another environment.
    """
    wrappers = []
    while type(env).__name__ in _TAKEN_OFF and inner(env) is not None:
        wrappers.append(env)
        env = inner(env)
    layer = env
    while layer is not None:
        kinds = [each.__name__ for each in type(layer).__mro__ if each.__name__ in (*_TAKEN_OFF, *_BATCHED)]
        where = "" if layer is env else f" under {type(env).__name__}"
        check(
            not kinds or inner(layer) is None,
            f"{type(layer).__name__}{where} cannot be taken off, and environments are stepped one by one, without "
            "resets: give adapt the environment with wrappers of your own alone.",
        )
        layer = inner(layer)
    return env, wrappers


def check_changed(env: Any, replaced: str, called: str) -> None:
    """Raise ``ConfigError`` if ``env``, or a wrapper in it, changes the method ``replaced``: ``called`` is used."""
    depth = lambda layer, name: next(  # noqa: E731
        (i for i, each in enumerate(type(layer).__mro__) if name in vars(each)), math.inf
    )
    layer = env
    while layer is not None:
        check(
            depth(layer, replaced) >= depth(layer, called),
            f"{type(layer).__name__} changes {replaced}, which resets by itself, so that {called} is called in its "
            f"place: change {called}, or give adapt the environment without it.",
        )
        layer = inner(layer) if depth(layer, called) == math.inf else None


def ending_after(env: Any, limit: int) -> Any:
    """A copy of ``env``, and of wrappers around it, whose own time limit is beyond ``limit``; itself if it has none."""
    own = getattr(env, "__dict__", {})
    name = next((name for name in ("env", "_env") if hasattr(own.get(name), "step")), None)
    if name is not None:
        return _changed(env, name, ending_after(own[name], limit))
    return _changed(env, "time_limit", limit + 1) if is_integer(own.get("time_limit")) else env


def _changed(env: Any, name: str, value: Any) -> Any:
    """A copy of ``env`` with another attribute; ``copy.copy`` asks wrappers for methods before they wrap anything."""
    changed = object.__new__(type(env))
    vars(changed).update(vars(env) | {name: value})
    return changed
