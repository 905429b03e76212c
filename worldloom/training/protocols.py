"""Published experiments by name; each family provides its own, see ``Algorithm.protocols``."""

from __future__ import annotations

import contextlib
import fnmatch
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from worldloom.algorithm import ExperimentProtocol, Recipe, env_shapes
from worldloom.config import nearest, shown, thaw
from worldloom.envs import VectorEnv, make_env
from worldloom.envs.make import usual_options, usual_time_limit
from worldloom.errors import ConfigError
from worldloom.families import family_names, get_family
from worldloom.training.config import TrainingConfig
from worldloom.training.recipes import recipe
from worldloom.training.train_ratio import TrainRatio

_FREE_TRAINING = frozenset(
    {"seed", "device", "mesh", "loop", "log_interval", "save_interval"}
    | {"updates_per_call", "microbatches", "remat", "replay_storage"}
    | {"env_steps", "total_steps"}
)
"""Fields of ``TrainingConfig`` that say where and how a run is computed, not what; and its end, compared as a whole."""
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

    @property
    def env_options(self) -> dict[str, Any]:
        """The protocol's arguments of ``make_env``; options of its suite are left out for an environment of another."""
        options = dict(self.protocol.env_options)
        arguments = inspect.signature(make_env).parameters
        return options if self.in_scope else {name: options[name] for name in options if name in arguments}

    def make_env(self, **changes: Any) -> VectorEnv:
        """The environments, with ``changes`` to the arguments of ``make_env``."""
        with self.named_in_errors():
            return make_env(self.env, **{**self.env_options, **changes})

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Let errors say that arguments of the environments are the protocol's, where it is not published for them."""
        try:
            yield
        except ConfigError as error:
            if self.in_scope or not self.env_options:
                raise
            options = ", ".join(f"{name}={value!r}" for name, value in self.env_options.items())
            raise ConfigError(f"{error} The protocol {self.name} asks for {options}.") from error

    def recipe(self, env: VectorEnv, given: Mapping[str, Any] | None = None) -> Recipe:
        """All settings: the family's recipe with the protocol's values, and those ``given``, in place of its own.

        They are those of the published size: a model of another size differs in the fields of its preset alone. A given
        ``total_steps`` replaces the protocol's budget of environment steps.

        Raises ``UnknownFieldError`` if a given field is one of neither config.
        """
        given = dict(given or {})
        own = {**self.protocol.model_fields, **self.protocol.training}
        reasons = dict.fromkeys(own, "protocol")
        if "total_steps" in given and "env_steps" in own:
            own["env_steps"], reasons["env_steps"] = 0, "total_steps is given"
        found = recipe(f"{self.name.partition('/')[0]}:{self.protocol.size}", env, {**own, **given})
        reasons = {field: reason for field, reason in {**found.reasons, **reasons}.items() if field not in given}
        return found._replace(reasons=reasons)

    def changes(self, config: Any, training: TrainingConfig, env: VectorEnv) -> dict[str, list[Any]]:
        """What of a run differs from the protocol: name → [value of the protocol, value of the run].

        Seed, device and what else leaves the experiment the same are not compared, and evaluations only where they are
        what is scored. An argument of the environments that was left out is what it came to.

        Args:
          config: the config of the run's model.
          training: the run's training config.
          env: the run's environments.
        """
        published: Any = _PublishedEnv(env, self)
        expected = self.recipe(published)
        # Shapes are those of the run: that the environment is another one is said by its name.
        model = type(config).from_size(self.protocol.size, **{**expected.model, **env_shapes(env)})
        pairs = {name: (value, getattr(config, name, None)) for name, value in vars(model).items()}
        own, free = TrainingConfig(**expected.training), _FREE_TRAINING
        free |= frozenset() if self.protocol.score.source == "evaluation" else _EVALUATION
        pairs |= {name: (value, getattr(training, name)) for name, value in vars(own).items() if name not in free}
        pairs |= self._ends(model, own, training, published.action_repeat)
        pairs |= self._options(env)
        if not self.in_scope:
            pairs["env"] = (" or ".join(self.protocol.envs), self.env)
        return {name: [thaw(old), thaw(new)] for name, (old, new) in pairs.items() if old != new}

    def _ends(
        self, model: Any, published: TrainingConfig, training: TrainingConfig, repeat: int
    ) -> dict[str, tuple[int, int]]:
        """The end of the published run and that of a run with the config ``training``, in what the latter counts."""
        if bool(published.env_steps) == bool(training.env_steps):
            name = "env_steps" if published.env_steps else "total_steps"
            return {name: (getattr(published, name), getattr(training, name))}
        spec = get_family(self.name.partition("/")[0]).algorithm.replay_spec(model, published)
        ratio = TrainRatio.of(published, spec.rows - bool(spec.latents))
        if published.env_steps:
            return {"total_steps": (ratio.updates(published.env_steps // repeat), training.total_steps)}
        return {"env_steps": (ratio.decisions(published.total_steps) * repeat, training.env_steps)}

    def _options(self, env: VectorEnv) -> dict[str, tuple[Any, Any]]:
        """Arguments of the environments by name, of the protocol and of ``env``: both as they come into effect."""
        given = {name: value for name, value in env.settings.items() if name not in _FREE_ENV and value is not None}
        fixed, spec = dict(self.protocol.env_options), env.settings.get("spec")
        usual = {"num_envs": 1, **usual_options(spec)}
        if isinstance(spec, str) and "time_limit" in {**given, **fixed}:
            usual["time_limit"] = usual_time_limit(spec)
        ours, theirs = {**usual, **fixed}, {**usual, **given}
        ours.setdefault("action_repeat", env.action_repeat)
        theirs |= {"action_repeat": env.action_repeat, "num_envs": env.num_envs}
        return {name: (ours.get(name), theirs.get(name)) for name in {**ours, **theirs}}


class _PublishedEnv:
    """Environments as recipes see them, with shapes and lengths of ``env`` and all else as the protocol has it."""

    def __init__(self, env: VectorEnv, experiment: Experiment):
        self._env = env
        of_protocol = experiment.protocol
        options = dict(of_protocol.env_options)
        self.num_envs: int = options.get("num_envs", 1)
        self.action_repeat: int = options.get("action_repeat", env.action_repeat)
        self.settings = {**env.settings, **options}
        self.action_type = env.action_type
        if not experiment.in_scope and of_protocol.envs:
            # What is published for a suite does not depend on the environment that it is tried in.
            self.settings["spec"] = of_protocol.envs[0]
            self.action_type = of_protocol.action_type or env.action_type

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)


def protocol_names() -> list[str]:
    """Names of all protocols, ``family/protocol``."""
    return [f"{family}/{name}" for family in family_names() for name in get_family(family).algorithm.protocols]


def what_is_trained(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's ``settings``, as its folder holds them, makes the experiment, by name.

    Seed, device, end, and how often it is logged, saved and evaluated are left out.
    """
    training = {name: value for name, value in settings["training"].items() if name not in _FREE_TRAINING | _EVALUATION}
    given = {name: value for name, value in (settings.get("env") or {}).items() if value is not None}
    env = {**(settings.get("env_defaults") or {}), **given}
    return {**settings["model"], **training, **{name: env[name] for name in env.keys() - _FREE_ENV}}


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
    if not isinstance(env, str | None):
        raise ConfigError(f"env must be the name of an environment, such as 'dmc:walker_walk', not {shown(env)}.")
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
    if not isinstance(name, str):
        raise ConfigError(f"A protocol is named by text such as 'tdmpc2/dmc', not {shown(name)}.")
    if name not in protocol_names():
        raise ConfigError(
            f"There is no protocol '{name}'.{nearest(name, protocol_names())} There are {', '.join(protocol_names())}; "
            "worldloom list protocols describes them."
        )
    family, _, own = name.partition("/")
    return get_family(family).algorithm.protocols[own]
