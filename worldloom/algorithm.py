"""The interface of a model family: :class:`Algorithm`, and the types of its functions' arguments and results.

Trainer, command line, evaluation and reports use a family through this record alone, so a family in a user's own file
works like the built-in ones. See the page "Contributing" for how to write one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

from worldloom.config import FrozenMapping
from worldloom.describe import described

Params = dict[str, Any]
"""All weights of a model: a nested dict of arrays, by part and layer."""
Batch = Mapping[str, Any]
"""Windows (slices of consecutive rows) [B, T, ...] of ``obs, actions, rewards, is_first, is_last, is_terminal`` under
the arrival rule: reward and flags of row t belong to arriving at ``obs[:, t]``, ``actions[:, t]`` is chosen there. With
stored latents also ``context``: the latents of row 0, [B, ...] by name."""
Update = Callable[["TrainState", Batch, jax.Array | None], tuple["TrainState", dict[str, Any]]]
"""``update(state, batch, key) -> (state, metrics)``: pure, jitted by the caller; with ``key=None`` every random draw is
replaced by the mode of its distribution. Metrics are float scalars by name, including the loss terms; the optional
entry :data:`LATENTS` holds fresh latents [B, T, ...] by name, which are written back to replay."""

_NOTHING = FrozenMapping({})

LATENTS = "replay"
"""Name of the metrics entry that holds the latents to be written back to replay."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class TrainState:
    """Everything that one update changes, and the run's key: a pytree of arrays only.

    Attributes:
      step: updates done, int32 [].
      params: *all* weights of the model: trained parts, slow (target) networks, running statistics.
      opt_state: state of the family's optimizers.
      key: root key of the run; the key of update ``n`` is ``fold_in(key, n)``.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    key: jax.Array

    def replace(self, **changes: Any) -> TrainState:
        """A copy with ``changes``."""
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        arrays = f"params={described(self.params)}, opt_state={described(self.opt_state)}"
        return f"TrainState(step={_shown_step(self.step)}, {arrays})"


def _shown_step(step: Any) -> str:
    """The number in ``TrainState.step``, or what is left of it: in traced code and after donation it has no value."""
    if isinstance(step, jax.core.Tracer) or getattr(step, "is_deleted", bool)():
        return "?"
    return f"{int(step):,}"


class ReplaySpec(NamedTuple):
    """An algorithm's requirements on replay.

    Attributes:
      rows: rows per window: those that gradients flow through, plus context rows.
      cross_episodes: whether a window may extend across an episode's end (``is_first`` marks the next one's start).
      latents: shape, without batch axes, of each latent stored with a row; empty for none.
      open_episodes: online, whether windows may hold rows of an episode in progress. If not, an episode is replayed
        once it is over, or while no finished one is long enough for a window.
      fresh_first: online, whether every run of ``rows`` successive new rows of an environment is replayed once, as soon
        as it is complete, before windows are drawn at random.
    """

    rows: int
    cross_episodes: bool = False
    latents: Mapping[str, tuple[int, ...]] = {}
    open_episodes: bool = True
    fresh_first: bool = False


class Recipe(NamedTuple):
    """Recommended settings: fields of the model's config and of ``TrainingConfig``, with reasons.

    Attributes:
      model: fields of the family's config, including the environment's shapes.
      training: fields of ``TrainingConfig``.
      reasons: field name → short reason, for values that differ from the family's usual ones.
    """

    model: dict[str, Any]
    training: dict[str, Any]
    reasons: dict[str, str]

    def override(self, given: Mapping[str, Any]) -> Recipe:
        """A copy with the values of ``given`` for its own fields, and without reasons for them.

        Other fields that were given are added by :func:`worldloom.training.recipe`, which knows whose they are.
        """
        return Recipe(
            {field: given.get(field, value) for field, value in self.model.items()},
            {field: given.get(field, value) for field, value in self.training.items()},
            {field: reason for field, reason in self.reasons.items() if field not in given},
        )


class ScoreRule(NamedTuple):
    """How a published score is computed from a run.

    Attributes:
      source: ``"training"``: the mean return of training episodes; ``"evaluation"``: the mean return of the newest
        evaluation; ``"achievements"``: success rates over all training episodes, and their geometric mean.
      window: environment steps (from, to) in which training episodes must end, or up to which evaluations count; None
        is the last twentieth of the budget, for evaluations the whole of it.
      text: the rule in words.
    """

    source: str
    window: tuple[int, int] | None
    text: str


@dataclasses.dataclass(frozen=True)
class ExperimentProtocol:
    """A published experiment of a family: everything around the losses that its curves depend on.

    Attributes:
      size: preset of the model.
      envs: environments that it is run in, as patterns: ``"dmc:*"``.
      score: how its score is computed.
      env_options: arguments of ``make_env``, options of the suite included.
      model_fields: fields of the model's config that differ from the preset.
      training: fields of ``TrainingConfig``; ``env_steps`` is the budget.
      derived: fields whose values follow from the environment by the family's recipe → the rule in words.
      action_type: kind of the actions in ``envs``; empty if there are several. Recipes may depend on it, and the
        environment of a run may have another one.
      curve: name of the published curves, see :attr:`Algorithm.published_curve`; empty for none.
      data: for an experiment with recorded episodes, what they are; empty for one in environments.
      data_fields: fields of the model's config that follow from these episodes.
    """

    size: str
    envs: tuple[str, ...]
    score: ScoreRule
    env_options: FrozenMapping = _NOTHING
    model_fields: FrozenMapping = _NOTHING
    training: FrozenMapping = _NOTHING
    derived: FrozenMapping = _NOTHING
    action_type: str = ""
    curve: str = ""
    data: str = ""
    data_fields: FrozenMapping = _NOTHING


class TaskSpec(NamedTuple):
    """One of the tasks of a multitask model.

    Attributes:
      name: name of the task.
      number: its number in data and model.
      env: its environment, as ``make_env`` takes it; None if there is none here.
      env_options: further arguments of ``make_env``.
      best: return that counts as a score of 100.
    """

    name: str
    number: int
    env: str | None
    env_options: Mapping[str, Any] = _NOTHING
    best: float = 1000.0

    def score(self, episode_return: float) -> float:
        """The published score of a return: 0 to 100."""
        return 100 * episode_return / self.best


class Curve(NamedTuple):
    """A published learning curve: returns after ``steps`` environment steps; lists of equal lengths.

    ``low`` and ``high`` are the worst and the best seed; equal to ``mean`` where only the mean was published.
    """

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


class MakeUpdate(Protocol):
    """Type of :attr:`Algorithm.make_update`."""

    def __call__(self, config: Any, training: Any, *, model_class: type[Any]) -> Update:
        """See :class:`Algorithm`."""


class Policy(Protocol):
    """Type of :attr:`Algorithm.policy`."""

    def __call__(
        self, model: Any, carry: Any, obs: Any, key: jax.Array | None, *, is_first: jax.Array | None = None
    ) -> tuple[Any, Any]:
        """See :class:`Algorithm`."""


def act(
    model: Any, carry: Any, obs: Any, key: jax.Array | None, *, is_first: jax.Array | None = None
) -> tuple[Any, Any]:
    """``model.act(carry, obs, key, is_first=is_first)``: the policy of a model that has an ``act`` method."""
    return model.act(carry, obs, key, is_first=is_first)


def no_carry(config: Any, num_envs: int) -> tuple[()]:
    """The carry of a policy without memory."""
    return ()


def no_latents(carry: Any) -> dict[str, jax.Array]:
    """For algorithms that store no latents in replay."""
    return {}


def accept_data(config: Any, *, has_terminals: bool, online: bool) -> None:
    """For algorithms that train on any data of the right shapes."""


def no_short_updates(config: Any) -> bool:
    """For algorithms whose updates always take longer than a step of the environments."""
    return False


def no_plans(config: Any) -> list[dict[str, Any]]:
    """For algorithms that do not plan: there is nothing to make smaller."""
    return [{}]


def no_tasks(config: Any) -> list[TaskSpec]:
    """For models of one task, or of tasks that are not known."""
    return []


def no_curve(name: str, env: str) -> Curve | None:
    """For algorithms without published curves."""
    return None


def env_shapes(env: Any) -> dict[str, Any]:
    """The fields of a model's config that its environment determines."""
    return {"obs_shape": env.obs_shape, "action_dim": env.action_dim, "action_type": env.action_type}


def window_prefill(training: dict[str, Any], env: Any, given: Mapping[str, Any]) -> dict[str, str]:
    """Raise ``training["prefill"]`` so that each environment collects a window; returns the reason if it was raised.

    A window consists of rows of one environment, so each environment must have taken that many steps before the first
    batch, and two more: a context row, and the row whose action is not known yet.
    """
    rows = env.num_envs * (given.get("sequence_length", training.get("sequence_length", 0)) + 2)
    if training.get("prefill", rows) >= rows:
        return {}
    training["prefill"] = rows
    return {"prefill": f"a window in each of {env.num_envs} environments"}


def plain_recipe(size: str, env: Any, given: Mapping[str, Any]) -> Recipe:
    """The environment's shapes, ``device="auto"``, and otherwise the defaults of both configs."""
    shapes = {} if env is None else env_shapes(env)
    recipe = Recipe(shapes, {"device": "auto"}, dict.fromkeys(shapes, "of the environment"))
    return recipe.override(given)


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A family's algorithm: pure functions, and the properties of them that a trainer depends on.

    Attributes:
      init_state: ``(model, training, key) -> TrainState`` before the first update of a run with root ``key`` under a
        ``TrainingConfig``. Weights and key are copies, so that updates may donate the state.
      make_update: ``(config, training, *, model_class) -> update``, see :data:`Update`. Both configs are closed over.
        The update rebuilds its model as ``merge(model_class, config, params)`` and computes the loss with the model's
        methods, so that a subclass trains what it overrides. It reads only those fields of ``training`` that
        ``TrainingConfig.of_update`` keeps.
      policy: ``(model, carry, obs, key, *, is_first) -> (carry, actions)`` for N environments, used to collect data;
        called inside traced code with a model of the current weights. ``is_first`` bool [N] marks observations that
        start an episode.
      replay_spec: ``(config, training) -> ReplaySpec``.
      loss_terms: names of the loss terms among an update's metrics, ``"loss"`` (the total) first. Training stops when
        one of them is not finite. Terms that a subclass of the model adds are in its own ``loss_terms``.
      eval_policy: like ``policy``, used to measure returns; None means ``policy``.
      initial_carry: ``(config, num_envs) -> carry`` of a policy before the first observations, a pytree of arrays.
      stored_latents: ``carry -> {name: [N, ...]}``, float32 latents to store with the rows just acted on, named as in
        ``ReplaySpec.latents``.
      validate_data: ``(config, *, has_terminals, online)`` raises ``DataError`` or ``ConfigError`` for data that the
        algorithm cannot train on; called once per source, and online again when a terminal row arrives.
      recipe: ``(size, env, given) -> Recipe``: recommended settings for the preset ``size`` (empty for the config's
        defaults) in ``env`` (a ``VectorEnv``; None gives only what does not depend on one). Fields in ``given`` are
        fixed; recommendations that depend on them are derived from their values.
      random_prefill: whether online training begins with uniformly random actions instead of the untrained policy's;
        ``TrainingConfig.prefill_policy`` may choose otherwise.
      samples_in_evaluation: whether ``eval_policy`` samples its actions, so that a greedy evaluation beside it says
        something else; ``TrainingConfig.eval_greedy`` may choose otherwise.
      short_updates: ``config -> bool``, whether an update on a CPU takes no longer than a step of the environments; the
        command line then lets the two overlap, instead of keeping freed memory (``devices.keep_freed_memory``).
      planner_fields: fields of the config that change how the model plans when it acts, and neither weights nor their
        shapes; empty for algorithms that do not plan.
      tasks: ``config -> [TaskSpec, ...]``, the tasks of a multitask model, where they are known; its ``single_task``
        method makes a single-task model of one.
      smaller_plans: ``config -> [{field: value}, ...]``, changes of ``planner_fields`` from the config's own plan (an
        empty dict) to the least work; an agent with a time limit acts by the first that is fast enough.
    """

    init_state: Callable[[Any, Any, jax.Array], TrainState]
    make_update: MakeUpdate
    replay_spec: Callable[[Any, Any], ReplaySpec]
    loss_terms: tuple[str, ...] = ("loss",)
    policy: Policy = act
    eval_policy: Policy | None = None
    initial_carry: Callable[[Any, int], Any] = no_carry
    stored_latents: Callable[[Any], dict[str, jax.Array]] = no_latents
    validate_data: Callable[..., None] = accept_data
    recipe: Callable[[str, Any, Mapping[str, Any]], Recipe] = plain_recipe
    random_prefill: bool = True
    samples_in_evaluation: bool = False
    short_updates: Callable[[Any], bool] = no_short_updates
    planner_fields: tuple[str, ...] = ()
    smaller_plans: Callable[[Any], list[dict[str, Any]]] = no_plans
    frame_stack: int | None = None
    protocols: Mapping[str, ExperimentProtocol] = _NOTHING
    published_curve: Callable[[str, str], Curve | None] = no_curve
    tasks: Callable[[Any], list[TaskSpec]] = no_tasks

    @property
    def evaluation_policy(self) -> Policy:
        """``eval_policy``, or ``policy`` where that is None."""
        return self.eval_policy or self.policy
