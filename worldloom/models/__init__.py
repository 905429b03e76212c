"""The two families of world models and the table that finds them by name. Names are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worldloom.lazy import lazy_names

if TYPE_CHECKING:
    from worldloom.models.base import WorldModel
    from worldloom.models.dreamer import DreamerV3Config, DreamerV3WorldModel
    from worldloom.models.registry import create_world_model, from_pretrained, get_config, get_model_info, list_models
    from worldloom.models.tdmpc2 import TDMPC2Config, TDMPC2WorldModel

_LAZY = {
    "DreamerV3Config": "worldloom.models.dreamer",
    "DreamerV3WorldModel": "worldloom.models.dreamer",
    "TDMPC2Config": "worldloom.models.tdmpc2",
    "TDMPC2WorldModel": "worldloom.models.tdmpc2",
    "WorldModel": "worldloom.models.base",
    "create_world_model": "worldloom.models.registry",
    "from_pretrained": "worldloom.models.registry",
    "get_config": "worldloom.models.registry",
    "get_model_info": "worldloom.models.registry",
    "list_models": "worldloom.models.registry",
}

__all__ = [
    "DreamerV3Config",
    "DreamerV3WorldModel",
    "TDMPC2Config",
    "TDMPC2WorldModel",
    "WorldModel",
    "create_world_model",
    "from_pretrained",
    "get_config",
    "get_model_info",
    "list_models",
]

__getattr__, __dir__ = lazy_names(__name__, _LAZY, __all__)
