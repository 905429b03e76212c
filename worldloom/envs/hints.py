"""What to write instead of a name of an environment that does not exist, or what to install for one that does."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

JAX_ENV = ("reset", "step", "obs_shape", "action_dim", "action_type", "time_limit")
"""What an object has that is an environment in JAX, see :class:`worldloom.envs.jax.JaxEnv`."""

_EXAMPLES = {"dmc": "dmc:cartpole_swingup", "dmc_vision": "dmc_vision:walker_walk", "atari": "atari:pong"}
_EXAMPLES |= {"atari100k": "atari100k:pong", "crafter": "crafter:reward"}
_OTHER_NAMES = {"dm_control": "dmc", "dmcontrol": "dmc", "dm": "dmc", "suite": "dmc", "ale": "atari"}
_PACKAGES = {
    "box2d": ("gymnasium[box2d]", ("LunarLander", "BipedalWalker", "CarRacing")),
    "mujoco": (
        "gymnasium[mujoco]",
        ("Ant", "HalfCheetah", "Hopper", "Humanoid", "Inverted", "Pusher", "Reacher", "Swimmer", "Walker2d"),
    ),
    "toy-text": ("gymnasium[toy-text]", ("Blackjack", "CliffWalking", "FrozenLake", "Taxi")),
    "classic-control": ("gymnasium[classic-control]", ("Acrobot", "CartPole", "MountainCar", "Pendulum")),
}


def suggestion(name: str, suites: Iterable[str]) -> str:
    """A sentence with the spelling that is meant by ``name``, or an empty string.

    Known are a suite without a task (``crafter``, ``dmc``) and the ids of other packages: Shimmy's
    ``dm_control/cartpole-swingup-v0``, ``ALE/Pong-v5``, ``PongNoFrameskip-v4``, ``CrafterReward-v1``.
    """
    plain = name.lower().replace("-", "_").replace(":", "/")
    prefix, _, task = re.sub(r"_?v\d+$", "", plain).partition("/")
    suite = _OTHER_NAMES.get(prefix, prefix)
    if task and suite in ("dmc", "atari"):
        # Atari ids run words together, "SpaceInvaders"; the suite writes "space_invaders".
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", re.split("[/:]", name)[-1].partition("-")[0]).lower()
        return f" Did you mean '{suite}:{words if suite == 'atari' else task}'?"
    if plain.startswith("crafter") and "crafter" in suites:
        return f" Did you mean 'crafter:{'noreward' if 'noreward' in plain or 'no_reward' in plain else 'reward'}'?"
    if suite in suites:
        return f" '{suite}' is a suite: add a task, as in '{_EXAMPLES.get(suite, suite + ':TASK')}'."
    game = re.fullmatch(r"([A-Z][A-Za-z]+?)(NoFrameskip|Deterministic)?-(ram-)?v\d", name)
    if game and game[2]:
        return f" Did you mean 'atari:{re.sub(r'(?<=[a-z])(?=[A-Z])', '_', game[1]).lower()}'?"
    return ""


def about_object(value: Any) -> str:
    """A sentence on what would make an environment of an object that is none, or an empty string."""
    from worldloom.envs.jax.adapters import is_adaptable  # when it is needed: worker processes need no JAX

    name = type(value).__name__
    missing = [each for each in JAX_ENV if not hasattr(value, each)]
    if not missing:
        return f" A {name} is an environment in JAX: give make_env the object itself."
    if is_adaptable(value):
        return f" worldloom.envs.jax.adapt makes an environment in JAX of a {name}."
    if len(missing) == len(JAX_ENV):
        return ""
    return (
        f" Of what an environment in JAX has, a {name} lacks {', '.join(missing)}; see worldloom.envs.jax.JaxEnv, and "
        "gymnasium.Env for one that is not in JAX."
    )


def install_line(name: str, error: BaseException) -> str:
    """How to install what the environment ``name`` misses, from its name or from the error's own text."""
    for package, names in _PACKAGES.values():
        if name.rpartition(":")[2].startswith(names):
            return f"pip install '{package}'"
    found = re.search(r"pip install [^`\n]*", str(error))
    return found[0].strip().rstrip(".") if found else f"pip install {getattr(error, 'name', None) or 'it'}"
