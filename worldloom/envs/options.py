"""Options of environments: which there are, and what values they take, before an environment is made with them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from gymnasium.envs.registration import EnvSpec, load_env_creator

from worldloom.config import check, is_number, nearest

_OF_GYM_MAKE = ("render_mode",)
"""What ``gymnasium.make`` itself takes, beside what ``make_env`` gives it."""


def check_options(env: str, known: Mapping[str, Any], options: Mapping[str, Any], *, others: bool = False) -> None:
    """Raise ``ConfigError`` for an option that ``env`` does not have, or a value of another kind than the usual one.

    Args:
      env: name of the environments, for errors.
      known: option → its usual value, which says of what kind it is; None for any.
      options: those that are given.
      others: whether there may be more than those that are known.
    """
    for name, value in options.items():
        if name not in known:
            listed = ", ".join(sorted(known)) or "none"
            hint = nearest(name, known)
            check(others, f"{env} has no option '{name}'; its options are {listed}.{hint}")
            continue
        usual = known[name]
        if isinstance(usual, bool):
            check(isinstance(value, bool), f"The option {name} of {env} is true or false, not {value!r}.")
        elif is_number(usual):
            check(is_number(value), f"The option {name} of {env} is a number like {usual:g}, not {value!r}.")
        elif isinstance(usual, str):
            check(isinstance(value, str), f"The option {name} of {env} is a text like {usual!r}, not {value!r}.")


def gym_options(spec: EnvSpec) -> tuple[dict[str, Any], bool]:
    """The options of a registered environment by name with their usual values, and whether it may take others."""
    entry = spec.entry_point
    known: dict[str, Any] = dict.fromkeys(_OF_GYM_MAKE)
    if entry is None:
        return known, True
    creator = load_env_creator(entry) if isinstance(entry, str) else entry
    try:
        parameters = inspect.signature(creator).parameters.values()
    except (TypeError, ValueError):  # written in C, say
        return known, True
    for each in parameters:
        if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD):
            known[each.name] = None if each.default is each.empty else each.default
    return {**known, **spec.kwargs}, any(each.kind is each.VAR_KEYWORD for each in parameters)
