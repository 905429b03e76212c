"""Which environments a run was collected in, for checkpoints: a run is resumed in the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worldloom.envs import VectorEnv
from worldloom.envs.make import usual_options
from worldloom.errors import ConfigError


def env_identity(env: VectorEnv) -> dict[str, Any]:
    """The settings of ``env`` that determine its episodes, as JSON values; not those that say where and how it runs."""
    plain: dict[str, Any] = {
        name: value for name, value in env.settings.items() if isinstance(value, str | int | float | None)
    }
    plain |= {name: list(env.settings.get(name) or ()) or None for name in ("action_bounds", "drop_keys")}
    plain["join_actions"] = env.settings.get("join_actions") or None
    may_change = ("seed", "num_envs", "parallel", "worker_timeout", "on_bad_step", "action_repeat", "time_limit")
    usual = usual_options(env.settings.get("spec"))
    plain |= {name: value for name, value in usual.items() if plain.get(name) is None}
    # The repeat and time limit in effect: the arguments may be None for the suite's own.
    effective = {"action_repeat": env.action_repeat, "episode_length": env.episode_length}
    return {name: value for name, value in plain.items() if name not in may_change} | effective


def check_same_env(saved: Mapping[str, Any], env: VectorEnv) -> None:
    """Raise ``ConfigError`` if ``saved``, the identity of a run's environments, is not that of ``env``."""
    if not saved:
        return
    usual, identity = usual_options(env.settings.get("spec")), env_identity(env)
    # An option that was not given is the suite's usual one, and the same as giving that.
    before, now = {**usual, **_given(saved)}, {**usual, **_given(identity)}
    for name in {**saved, **now}:
        # Environments made from a function or an object have no spec to compare.
        if name in ("spec", "action_repeat", "episode_length") and not (name in saved and name in identity):
            continue
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"The run was collected from environments with {name}={before.get(name)!r}, these have "
                f"{now.get(name)!r}. Resume with the saved value, or go on inexactly by resume='continue' (--resume "
                "continue), or begin a new run from its weights: worldloom.training.checkpoint.load_weights."
            )


def _given(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if value is not None}
