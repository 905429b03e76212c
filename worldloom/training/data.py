"""Where the earlier library kept replay; here it is :mod:`worldloom.replay`."""

from __future__ import annotations

from typing import Never

from worldloom.migration import PUBLIC_NAMES


def __getattr__(name: str) -> Never:
    message = f"module '{__name__}' has no attribute '{name}'"
    if name == "ReplayBuffer" or name in PUBLIC_NAMES:
        # Import statements pass on this error, but would replace an AttributeError by a message of their own.
        raise ImportError(f"{message}. {PUBLIC_NAMES.get(name, 'It is in worldloom.training.')}", name=__name__)
    raise AttributeError(message, name=name)
