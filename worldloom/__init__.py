"""World models for reinforcement learning in JAX: DreamerV3, TD-MPC2, and families of your own.

The public names below are imported when first used, so that ``import worldloom`` costs little more than Python.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from worldloom._version import __version__
from worldloom.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    EnvContractError,
    EnvError,
    FileFormatError,
    MissingDependencyError,
    NonFiniteError,
    UnknownFieldError,
    UnknownModelError,
    WeightsError,
    WorldloomError,
)

if TYPE_CHECKING:
    from worldloom.acting import Policy, load_policy
    from worldloom.algorithm import Algorithm
    from worldloom.families import register_family
    from worldloom.models.base import WorldModel
    from worldloom.models.dreamer import DreamerV3Config, DreamerV3WorldModel
    from worldloom.models.registry import create_world_model, from_pretrained, get_config, list_models
    from worldloom.models.tdmpc2 import TDMPC2Config, TDMPC2WorldModel

_LAZY = {
    "Algorithm": "worldloom.algorithm",
    "Policy": "worldloom.acting",
    "load_policy": "worldloom.acting",
    "DreamerV3Config": "worldloom.models.dreamer",
    "DreamerV3WorldModel": "worldloom.models.dreamer",
    "TDMPC2Config": "worldloom.models.tdmpc2",
    "TDMPC2WorldModel": "worldloom.models.tdmpc2",
    "WorldModel": "worldloom.models.base",
    "create_world_model": "worldloom.models.registry",
    "from_pretrained": "worldloom.models.registry",
    "get_config": "worldloom.models.registry",
    "list_models": "worldloom.models.registry",
    "register_family": "worldloom.families",
}

__all__ = [
    "Algorithm",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "DreamerV3Config",
    "DreamerV3WorldModel",
    "EnvContractError",
    "EnvError",
    "FileFormatError",
    "MissingDependencyError",
    "NonFiniteError",
    "Policy",
    "TDMPC2Config",
    "TDMPC2WorldModel",
    "UnknownFieldError",
    "UnknownModelError",
    "WeightsError",
    "WorldModel",
    "WorldloomError",
    "__version__",
    "create_world_model",
    "from_pretrained",
    "get_config",
    "list_models",
    "load_policy",
    "register_family",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'worldloom' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
