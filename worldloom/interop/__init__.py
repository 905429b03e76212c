"""Import and export of the official programs' weights. The public names are imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "load_official_dreamerv3": "worldloom.interop.dreamerv3",
    "to_official_dreamerv3": "worldloom.interop.dreamerv3",
    "load_official_newt": "worldloom.interop.newt",
    "load_official_tdmpc2": "worldloom.interop.tdmpc2",
    "to_official_tdmpc2": "worldloom.interop.tdmpc2",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'worldloom.interop' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)
