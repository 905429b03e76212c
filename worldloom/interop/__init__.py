"""Import and export of the official programs' weights. The public names are imported on first use."""

from __future__ import annotations

from worldloom.lazy import lazy_names

_LAZY = {
    "load_official_dreamerv3": "worldloom.interop.dreamerv3",
    "to_official_dreamerv3": "worldloom.interop.dreamerv3",
    "load_official_newt": "worldloom.interop.newt",
    "load_official_tdmpc2": "worldloom.interop.tdmpc2",
    "to_official_tdmpc2": "worldloom.interop.tdmpc2",
}
__all__ = sorted(_LAZY)

__getattr__, __dir__ = lazy_names(__name__, _LAZY, __all__)
