"""Public names that are imported when they are first used, so that importing a package costs little."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from worldloom.migration import PUBLIC_NAMES


def lazy_names(
    module: str, places: Mapping[str, str], names: Sequence[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of the package ``module``.

    A name of the earlier library raises ``AttributeError``, in ``from … import`` statements ``ImportError``, with a
    sentence about its replacement.

    Args:
      module: the package's ``__name__``.
      places: the module that defines each name.
      names: the package's ``__all__``.
    """

    def __getattr__(name: str) -> Any:
        if name in places:
            return getattr(importlib.import_module(places[name]), name)
        message = f"module '{module}' has no attribute '{name}'"
        if name not in PUBLIC_NAMES:
            raise AttributeError(message, name=name)
        message = f"{message}, a name of the earlier library. {PUBLIC_NAMES[name]}"
        # An import statement would replace an AttributeError by a message of its own.
        if sys._getframe(1).f_globals.get("__name__") == "importlib._bootstrap":
            raise ImportError(message, name=module)
        raise AttributeError(message, name=name)

    return __getattr__, lambda: list(names)
