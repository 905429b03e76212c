"""Other people's recorded datasets, read from disk as they are sampled. Names are imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "Dataset": "worldloom.data.dataset",
    "open": "worldloom.data.opening",
    "inspect": "worldloom.data.inspection",
    "convert": "worldloom.data.conversion",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'worldloom.data' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)
