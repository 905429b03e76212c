"""Published experiments by name; each family provides its own, see ``Algorithm.protocols``."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any, NamedTuple

from worldloom.algorithm import ExperimentProtocol, Recipe
from worldloom.config import nearest, thaw
from worldloom.envs import VectorEnv, make_env
from worldloom.errors import ConfigError
from worldloom.families import family_names, get_family
from worldloom.training.config import TrainingConfig
from worldloom.training.recipes import recipe

_FREE_TRAINING = frozenset(
    {"seed", "device", "mesh", "loop", "log_interval", "save_interval"}
    | {"updates_per_call", "microbatches", "remat", "replay_storage"}
)
"""Fields of ``TrainingConfig`` that say where and how a run is computed, not what."""
_EVALUATION = frozenset({"eval_interval", "eval_episodes", "eval_at_start", "eval_at_end", "eval_greedy"})
_FREE_ENV = frozenset({"spec", "seed", "parallel", "worker_timeout"})


class Experiment(NamedTuple):
    """A protocol in one environment.

    Attributes:
      name: ``family/protocol``, such as ``"dreamerv3/atari100k"``.
      model: preset, such as ``"dreamerv3:size200m"``.
      env: the environment.
      protocol: the family's record: options of environments, fields of both configs, score and curve.
    """

    name: str
    model: str
    env: str
    protocol: ExperimentProtocol

    @property
    def in_scope(self) -> bool:
        """Whether ``env`` is one of the protocol's environments."""
        return any(fnmatch.fnmatchcase(self.env, pattern) for pattern in self.protocol.envs)

    def make_env(self, **changes: Any) -> VectorEnv:
        """The environments, with ``changes`` to the arguments of ``make_env``."""
        return make_env(self.env, **{**self.protocol.env_options, **changes})

    def recipe(self, env: VectorEnv, given: Mapping[str, Any] | None = None) -> Recipe:
        """All settings: the family's recipe with the protocol's values, and those ``given``, in place of its own."""
        fixed = {**self.protocol.model_fields, **self.protocol.training, **(given or {})}
        found = recipe(self.model, env, fixed)
        model = {**found.model, **self.protocol.model_fields}
        training = {**found.training, **self.protocol.training}
        reasons = {**found.reasons, **dict.fromkeys([*self.protocol.model_fields, *self.protocol.training], "protocol")}
        return Recipe(model, training, reasons).override(given or {})

    def changes(self, config: Any, training: TrainingConfig, env: VectorEnv) -> dict[str, list[Any]]:
        """What of a run differs from the protocol: name → [value of the protocol, value of the run].

        Seed, device and what else leaves the experiment the same are not compared, and evaluations only where they are
        what is scored.

        Args:
          config: the config of the run's model.
          training: the run's training config.
          env: the run's environments.
        """
        expected = self.recipe(env)
        free = _FREE_TRAINING | (frozenset() if self.protocol.score.source == "evaluation" else _EVALUATION)
        pairs: dict[str, tuple[Any, Any]] = {}
        model = type(config).from_size(self.protocol.size, **expected.model)
        pairs |= {name: (value, getattr(config, name, None)) for name, value in vars(model).items()}
        of_training = vars(TrainingConfig(**expected.training))
        pairs |= {name: (value, getattr(training, name)) for name, value in of_training.items() if name not in free}
        options = {name: value for name, value in env.settings.items() if name not in _FREE_ENV and value is not None}
        options = {"action_repeat": env.action_repeat, "num_envs": env.num_envs, **options}
        fixed = self.protocol.env_options
        pairs |= {name: (fixed.get(name), options.get(name)) for name in {**fixed, **options}}
        if not self.in_scope:
            pairs["env"] = (" or ".join(self.protocol.envs), self.env)
        return {name: [thaw(old), thaw(new)] for name, (old, new) in pairs.items() if old != new}


def protocol_names() -> list[str]:
    """Names of all protocols, ``family/protocol``."""
    return [f"{family}/{name}" for family in family_names() for name in get_family(family).algorithm.protocols]


def protocol(name: str, env: str | None = None) -> Experiment:
    """The published experiment ``name`` in the environment ``env``.

        experiment = protocol("tdmpc2/dmc", "dmc:walker_walk")
        env = experiment.make_env(seed=1)
        model_fields, training_fields, _ = experiment.recipe(env)
        model = create_world_model(experiment.model, **model_fields)
        Trainer(model, TrainingConfig(**training_fields, seed=1), callbacks).train(env)

    Args:
      name: ``family/protocol``, as ``worldloom list protocols`` shows them. Names with ``@`` are of an earlier
        generation of the program, which published curves belong to.
      env: the environment; it may be left out where the protocol has only one.

    Raises:
      ConfigError: there is no such protocol; it needs recorded data; or an environment must be chosen.
    """
    found = find_protocol(name)
    if found.data:
        raise ConfigError(
            f"The protocol '{name}' is trained from recorded data ({found.data}), not in an environment; "
            "its settings are shown by worldloom list protocols."
        )
    if env is None:
        if len(found.envs) != 1 or "*" in found.envs[0]:
            raise ConfigError(f"The protocol '{name}' needs an environment: {' or '.join(found.envs)}.")
        env = found.envs[0]
    return Experiment(name, f"{name.partition('/')[0]}:{found.size}", env, found)


def find_protocol(name: str) -> ExperimentProtocol:
    """The record of ``family/protocol``. Raises ``ConfigError`` naming the nearest one if there is none."""
    if name not in protocol_names():
        raise ConfigError(
            f"There is no protocol '{name}'.{nearest(name, protocol_names())} See worldloom list protocols."
        )
    family, _, own = name.partition("/")
    return get_family(family).algorithm.protocols[own]
