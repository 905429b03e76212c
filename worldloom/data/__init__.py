"""Other people's recorded datasets, read from disk as they are sampled. Names are imported on first use."""

from __future__ import annotations

from worldloom.lazy import lazy_names

_LAZY = {
    "Dataset": "worldloom.data.dataset",
    "open": "worldloom.data.opening",
    "inspect": "worldloom.data.inspection",
    "convert": "worldloom.data.conversion",
}
__all__ = sorted(_LAZY)

__getattr__, __dir__ = lazy_names(__name__, _LAZY, __all__)
