"""Options of environments: which there are, and what values they take, before an environment is made with them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.error import Error

from worldloom.config import check, is_number, nearest
from worldloom.errors import ConfigError

_OF_GYM_MAKE = ("render_mode",)
"""What ``gymnasium.make`` itself takes, beside what ``make_env`` gives it."""
_PLAIN = (int, float, bool, "int", "float", "bool")
"""Annotations of parameters that take no text."""


def check_options(env: str, usual: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for an option that a suite does not have, or a value of another kind than the usual one.

    Args:
      env: name of the suite, for errors.
      usual: option → its usual value, which says of what kind it is; None for any.
      options: those that are given.
    """
    check_names(env, usual, options)
    for name, value in options.items():
        if isinstance(usual[name], bool):
            either = isinstance(value, bool | np.bool_) or (is_number(value) and value in (0, 1))
            check(either, f"The option {name} of {env} is true or false, not {value!r}.")
        elif is_number(usual[name]):
            check(is_number(value), f"The option {name} of {env} is a number like {usual[name]:g}, not {value!r}.")


def check_names(env: str, known: Iterable[str], options: Iterable[str]) -> None:
    """Raise ``ConfigError`` for an option that is none of the ``known`` ones."""
    known = sorted(known)
    for name in options:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise ConfigError(f"{env} has no option '{name}'; its options are {listed}.{nearest(name, known)}")


def check_gym_options(spec: EnvSpec, options: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for options that the constructor of a registered environment does not take.

    Of values only a text is refused, where the constructor says that it takes a number or a truth value: a default is
    one of the values that an option may have, and others may be of another kind.
    """
    check("max_episode_steps" not in options, "max_episode_steps is called time_limit here.")
    check("disable_env_checker" not in options, "disable_env_checker is always on here; leave it out.")
    entry = spec.entry_point
    if not options or entry is None:
        return
    try:
        creator = load_env_creator(entry) if isinstance(entry, str) else entry
        parameters = dict(inspect.signature(creator).parameters)
    except (ImportError, AttributeError, Error):  # What it lacks is said where it is made.
        return
    except (TypeError, ValueError):  # written in C, say
        return
    named = {n: p for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        check_names(spec.id, {*named, *spec.kwargs} - {*_OF_GYM_MAKE}, {*options} - {*_OF_GYM_MAKE})
    # Gymnasium annotates those of its own parameters that take values of several kinds.
    own = str(getattr(creator, "__module__", "")).startswith("gymnasium.")
    for name, value in options.items():
        if name not in named or not isinstance(value, str):
            continue
        usual, annotation = spec.kwargs.get(name, named[name].default), named[name].annotation
        plain = annotation in _PLAIN or (own and annotation is inspect.Parameter.empty)
        if plain and isinstance(usual, bool):
            raise ConfigError(f"The option {name} of {spec.id} is true or false, not {value!r}.")
        if plain and is_number(usual):
            raise ConfigError(f"The option {name} of {spec.id} is a number like {usual:g}, not {value!r}.")
