"""World models for reinforcement learning in JAX: DreamerV3, TD-MPC2, and families of your own.

The public names below are imported when first used, so that ``import worldloom`` costs little more than Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from worldloom.lazy import lazy_names

if TYPE_CHECKING:
    from worldloom.acting import Policy, load_policy
    from worldloom.algorithm import Algorithm
    from worldloom.envs import make_env
    from worldloom.families import register_family
    from worldloom.models.base import WorldModel
    from worldloom.models.dreamer import DreamerV3Config, DreamerV3WorldModel
    from worldloom.models.registry import create_world_model, from_pretrained, get_config, get_model_info, list_models
    from worldloom.models.tdmpc2 import TDMPC2Config, TDMPC2WorldModel
    from worldloom.replay import ReplayBuffer
    from worldloom.training.config import TrainingConfig
    from worldloom.training.one_call import train
    from worldloom.training.recipes import recipe
    from worldloom.training.trainer import Trainer

_LAZY = {
    "Algorithm": "worldloom.algorithm",
    "Policy": "worldloom.acting",
    "load_policy": "worldloom.acting",
    "DreamerV3Config": "worldloom.models.dreamer",
    "DreamerV3WorldModel": "worldloom.models.dreamer",
    "TDMPC2Config": "worldloom.models.tdmpc2",
    "TDMPC2WorldModel": "worldloom.models.tdmpc2",
    "ReplayBuffer": "worldloom.replay",
    "Trainer": "worldloom.training.trainer",
    "TrainingConfig": "worldloom.training.config",
    "WorldModel": "worldloom.models.base",
    "create_world_model": "worldloom.models.registry",
    "from_pretrained": "worldloom.models.registry",
    "get_config": "worldloom.models.registry",
    "get_model_info": "worldloom.models.registry",
    "list_models": "worldloom.models.registry",
    "make_env": "worldloom.envs",
    "recipe": "worldloom.training.recipes",
    "register_family": "worldloom.families",
    "train": "worldloom.training.one_call",
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
    "ReplayBuffer",
    "TDMPC2Config",
    "TDMPC2WorldModel",
    "Trainer",
    "TrainingConfig",
    "UnknownFieldError",
    "UnknownModelError",
    "WeightsError",
    "WorldModel",
    "WorldloomError",
    "__version__",
    "create_world_model",
    "from_pretrained",
    "get_config",
    "get_model_info",
    "list_models",
    "load_policy",
    "make_env",
    "recipe",
    "register_family",
    "train",
]

__getattr__, __dir__ = lazy_names(__name__, _LAZY, __all__)
