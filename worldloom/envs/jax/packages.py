"""Environments of other JAX packages by name; each package is imported when the first of its environments is made."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any

from worldloom.config import nearest
from worldloom.envs.jax.adapters import adapt
from worldloom.envs.jax.protocol import JaxEnv
from worldloom.errors import ConfigError

_log = logging.getLogger("worldloom")


def make_gymnax(name: str, **params: Any) -> JaxEnv:
    """``gymnax:CartPole-v1``; options are fields of its ``EnvParams``."""
    package = importlib.import_module("gymnax")
    _check_name("gymnax", name, package.registered_envs)
    env, defaults = package.make(name)
    return adapt(env, _replaced(f"gymnax:{name}", defaults, params))


def make_craftax(name: str, **params: Any) -> JaxEnv:
    """``craftax:Classic-Symbolic``, ``craftax:Classic-Pixels``, ``craftax:Symbolic``, ``craftax:Pixels``."""
    _check_name("craftax", name, ("Classic-Symbolic", "Classic-Pixels", "Symbolic", "Pixels"))
    make = importlib.import_module("craftax.craftax_env").make_craftax_env_from_name
    env = make(f"Craftax-{name}-v1", auto_reset=False)
    return adapt(env, _replaced(f"craftax:{name}", env.default_params, params))


def make_brax(name: str, *, episode_length: int = 1000, **options: Any) -> JaxEnv:
    """``brax:ant``; options go to the environment. Episodes last 1,000 steps, as with brax's own wrapper."""
    envs = importlib.import_module("brax.envs")
    _check_name("brax", name, getattr(envs, "_envs", {}))
    return adapt(_made(f"brax:{name}", envs.get_environment, name, options), time_limit=episode_length)


def make_playground(name: str, **options: Any) -> JaxEnv:
    """``playground:CartpoleBalance``; options are fields of its config. Episodes last its ``episode_length``."""
    registry = importlib.import_module("mujoco_playground").registry
    _check_name("playground", name, registry.ALL_ENVS)
    config = registry.get_default_config(name)
    unknown = [option for option in options if option not in config]
    if unknown:
        raise ConfigError(f"playground:{name} has no option {', '.join(unknown)}.{nearest(unknown[0], list(config))}")
    config.update(options)
    if (repeat := config.get("action_repeat", 1)) != 1:
        _log.warning(
            "playground:%s is trained with each action repeated %d times; make_env does that if told: action_repeat=%d "
            "(--action-repeat %d).", name, repeat, repeat, repeat,
        )  # fmt: skip
    return adapt(registry.load(name, config), time_limit=int(config.episode_length))


def make_navix(name: str, **options: Any) -> JaxEnv:
    """``navix:Navix-Empty-8x8-v0``; options go to ``navix.make``."""
    package = importlib.import_module("navix")
    _check_name("navix", name, package.registry())
    return adapt(_made(f"navix:{name}", package.make, name, options))


def make_jumanji(name: str, **options: Any) -> JaxEnv:
    """``jumanji:Snake-v1``; options go to the environment."""
    package = importlib.import_module("jumanji")
    _check_name("jumanji", name, package.registered_environments())
    return adapt(_made(f"jumanji:{name}", package.make, name, options))


def _made(spec: str, make: Any, name: str, options: Mapping[str, Any]) -> Any:
    """``make(name, **options)``. Raises ``ConfigError`` for options that the environment does not take."""
    try:
        return make(name, **options)
    except TypeError as error:
        if not options:
            raise
        raise ConfigError(f"{spec} cannot be made with {dict(options)}: {error}.") from error


def _check_name(prefix: str, name: str, known: Any) -> None:
    """Raise ``ConfigError`` for a name that the package does not list."""
    names = [str(each) for each in known]
    if names and name not in names:
        some = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise ConfigError(f"'{prefix}:{name}' is no environment of {prefix}, which has {some}.{nearest(name, names)}")


def _replaced(spec: str, params: Any, changes: Mapping[str, Any]) -> Any:
    unknown = [name for name in changes if not hasattr(params, name)]
    if unknown:
        fields = list(getattr(params, "__dataclass_fields__", {}))
        raise ConfigError(f"{spec} has no option {', '.join(unknown)}.{nearest(unknown[0], fields)}")
    return params.replace(**changes) if changes else params
