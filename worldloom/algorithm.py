"""What a family of world models provides, written once: :class:`Algorithm`, and the values that pass through it.

Trainer, command line, evaluation and reports talk to a family through this record alone, so a family in a user's own
file is treated as those of this package are. See the page "Contributing" for how to write one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

Params = dict[str, Any]
"""All weights of a model: a nested dict of arrays, by part and layer."""
Batch = Mapping[str, Any]
"""Windows of rows [B, T, ...] by the arrival rule: ``obs, actions, rewards, is_first, is_last, is_terminal``, and with
stored latents ``context``, those of row 0."""
Update = Callable[["TrainState", Batch, jax.Array | None], tuple["TrainState", dict[str, Any]]]
"""``update(state, batch, key) -> (state, metrics)``: pure, to be jitted by the caller; ``key=None`` takes the mode of
every draw. Metrics are float scalars by name, the loss terms among them; the entry :data:`LATENTS`, if there is one,
holds fresh latents [B, T, ...] by name, which go back to replay."""

LATENTS = "replay"
"""Name in an update's metrics of the latents to be written back to replay."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that one update changes, and the run's key: a pytree of arrays and nothing else.

    Attributes:
      step: updates done, int32 [].
      params: *all* weights of the model: trained parts, slow or target networks, running statistics.
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


class ReplaySpec(NamedTuple):
    """What an algorithm needs from replay.

    Attributes:
      rows: rows per window, those under gradient plus context rows.
      cross_episodes: whether a window may run over an episode's end (``is_first`` marks where the next one starts).
      latents: shape per row (without batch axes) of each latent stored beside the rows; empty for none.
    """

    rows: int
    cross_episodes: bool = False
    latents: Mapping[str, tuple[int, ...]] = {}


class Recipe(NamedTuple):
    """Settings to start from: fields of the model's config and of ``TrainingConfig``, with reasons.

    Attributes:
      model: fields of the family's config, the environment's shapes included.
      training: fields of ``TrainingConfig``.
      reasons: field name → half a sentence, where the value is not the family's usual one.
    """

    model: dict[str, Any]
    training: dict[str, Any]
    reasons: dict[str, str]

    def override(self, given: Mapping[str, Any]) -> Recipe:
        """The same with the values of ``given``, which need no reason."""
        return Recipe(
            {field: given.get(field, value) for field, value in self.model.items()},
            {field: given.get(field, value) for field, value in self.training.items()},
            {field: reason for field, reason in self.reasons.items() if field not in given},
        )


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
    """For algorithms whose updates take longer than a step of the environments."""
    return False


def no_plans(config: Any) -> list[dict[str, Any]]:
    """For algorithms that do not plan: there is nothing to make smaller."""
    return [{}]


def env_shapes(env: Any) -> dict[str, Any]:
    """The fields of a model's config that its environment determines."""
    return {"obs_shape": env.obs_shape, "action_dim": env.action_dim, "action_type": env.action_type}


def window_prefill(training: dict[str, Any], env: Any, given: Mapping[str, Any]) -> dict[str, str]:
    """Raise ``training["prefill"]`` to a window in each environment, and return the reason if it was.

    A window lies in the rows of one environment, so each of them must have taken that many steps (and two more: a
    context row, and the row whose action is not known yet) before the first batch.
    """
    rows = env.num_envs * (given.get("sequence_length", training.get("sequence_length", 0)) + 2)
    if training.get("prefill", rows) >= rows:
        return {}
    training["prefill"] = rows
    return {"prefill": f"a window in each of {env.num_envs} environments"}


def plain_recipe(size: str, env: Any, given: Mapping[str, Any]) -> Recipe:
    """The environment's shapes, and the defaults of both configs."""
    shapes = {} if env is None else env_shapes(env)
    recipe = Recipe(shapes, {"device": "auto"}, dict.fromkeys(shapes, "of the environment"))
    return recipe.override(given)


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A family's algorithm: pure functions, and the facts about them that a trainer must know.

    Attributes:
      init_state: ``(model, training, key) -> TrainState`` before the first update of a run with root ``key`` under a
        ``TrainingConfig``. Weights and key are copies, so that updates may donate the state.
      make_update: ``(config, training, *, model_class) -> update``, see :data:`Update`. Both configs are closed over.
        The update rebuilds its model as ``merge(model_class, config, params)`` and takes the loss from the model's
        methods, so that a subclass trains what it defines. It reads of ``training`` only what
        ``TrainingConfig.of_update`` keeps.
      policy: ``(model, carry, obs, key, *, is_first) -> (carry, actions)`` for N environments, as when data are
        collected; called inside traced code with the model that holds the current weights. ``is_first`` bool [N] marks
        observations that start an episode.
      replay_spec: ``(config, training) -> ReplaySpec``.
      loss_terms: names in an update's metrics that are terms of the loss, ``"loss"`` (the total) first. Training stops
        when one of them is not finite. Terms that a subclass of the model adds are in its own ``loss_terms``.
      eval_policy: likewise, as scores are measured; None is ``policy``.
      initial_carry: ``(config, num_envs) -> carry`` of a policy before the first observations, a pytree of arrays.
      stored_latents: ``carry -> {name: [N, ...]}``, float32 latents to store beside the rows just acted on, with the
        names of ``ReplaySpec.latents``.
      validate_data: ``(config, *, has_terminals, online)`` raises ``DataError`` or ``ConfigError`` for data that the
        algorithm cannot train on; called once per source, and online again when a terminal row arrives.
      recipe: ``(size, env, given) -> Recipe``: settings to start from for the preset ``size`` (empty for the config's
        defaults) in ``env`` (a ``VectorEnv``, or None: only what does not depend on one). Fields in ``given`` are
        fixed: they win, and what follows from them follows.
      random_prefill: whether online training begins with uniformly random actions instead of the untrained policy's.
      short_updates: ``config -> bool``, whether an update on a CPU takes no longer than a step of the environments; the
        command line then lets the two overlap, instead of keeping freed memory (``devices.keep_freed_memory``).
      planner_fields: fields of the config that change how the model plans when it acts, and neither weights nor their
        shapes; empty for algorithms that do not plan.
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
    short_updates: Callable[[Any], bool] = no_short_updates
    planner_fields: tuple[str, ...] = ()
    smaller_plans: Callable[[Any], list[dict[str, Any]]] = no_plans

    @property
    def evaluation_policy(self) -> Policy:
        """``eval_policy``, or ``policy`` where that is None."""
        return self.eval_policy or self.policy
