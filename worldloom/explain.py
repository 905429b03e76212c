"""Errors about arguments and attributes that do not exist: they say which ones do."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from worldloom.config import nearest
from worldloom.errors import UnknownFieldError

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)


def explain_arguments(hints: Mapping[str, str] | None = None) -> Callable[[F], F]:
    """A decorator: an unknown keyword argument raises ``UnknownFieldError`` that names the right one.

    Args:
      hints: sentences about arguments that have no counterpart, by name.
    """

    def decorate(function: F) -> F:
        names = [name for name in inspect.signature(function).parameters if name != "self"]

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name not in names:
                    what = function.__qualname__.removesuffix(".__init__")
                    hint = (hints or {}).get(name)
                    raise UnknownFieldError(
                        f"{what} has no argument '{name}'.{f' {hint}' if hint else nearest(name, names)} It takes "
                        f"{', '.join(names)}."
                    )
            return function(*args, **kwargs)

        return cast(F, checked)

    return decorate


def explain_attributes(hints: Mapping[str, str]) -> Callable[[C], C]:
    """A class decorator: the error about a missing attribute says what replaces it, where ``hints`` has a sentence."""

    def missing(self: Any, name: str) -> Any:
        hint = f" {hints[name]}" if name in hints else ""
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'.{hint}", name=name, obj=self)

    def decorate(cls: C) -> C:
        cls.__getattr__ = missing  # type: ignore[attr-defined]
        return cls

    return decorate
