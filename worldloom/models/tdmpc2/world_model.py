"""The TD-MPC2 world model: latent dynamics without decoder, reward, values and a policy prior to plan with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from worldloom.describe import described_fields
from worldloom.errors import DataError
from worldloom.models.base import WorldModel, check_one_batch, check_time_first, compiled
from worldloom.models.disagreement import Disagreement
from worldloom.models.tdmpc2 import losses, planner
from worldloom.models.tdmpc2.batch import TrainBatch, check_batch_axis, prepare_batch, prepare_observations
from worldloom.models.tdmpc2.checks import check_keys, check_tasks_fit, check_what_acts
from worldloom.models.tdmpc2.config import TDMPC2Config
from worldloom.models.tdmpc2.encoders import ImageEncoder, JointEncoder, SimNorm, VectorEncoder, make_encoder
from worldloom.models.tdmpc2.latent import LatentState
from worldloom.models.tdmpc2.losses import ModelLoss, PolicyLoss, Rollouts
from worldloom.models.tdmpc2.networks import (
    CategoricalPolicy,
    CategoricalSample,
    FusedDynamicsReward,
    GaussianPolicy,
    GaussianSample,
    TaskEmbedding,
    ValueScale,
)
from worldloom.models.tdmpc2.single_task import single_task_weights
from worldloom.nn.ensemble import Ensemble
from worldloom.nn.normed import NormedMLP
from worldloom.ops import symlog_twohot
from worldloom.ops.keys import split_key


class Trajectory(NamedTuple):
    """An imagined rollout, time first.

    Attributes:
      states: latents [H+1, B, L]; the first is the start state.
      rewards: [H, B] expected reward of each step, in the units of the data.
      continues: [H, B] probability that the episode continues after each step; 1 unless the config is ``episodic``.
    """

    states: LatentState
    rewards: jax.Array
    continues: jax.Array

    def __repr__(self) -> str:
        return described_fields(self)


class TDMPC2WorldModel(WorldModel):
    """TD-MPC2 (Hansen, Su, Wang 2024): see :class:`TDMPC2Config` for sizes and :class:`WorldModel` for arguments.

    Continuous actions are float [..., A] in [−1, 1]; discrete ones integers [...] or one-hots [..., A]. A multitask
    model takes ``task``, integers with the batch axes, in every method; others take none. Wherever ``key`` is None,
    every draw takes its mode: mean actions, the first two Q networks, no dropout, no image shift.

    A subclass changes the losses by overriding :meth:`model_loss` or :meth:`policy_loss`, which training and
    :meth:`compute_loss` call. What losses and planner use of a model is listed in ``losses.LossModel`` and
    ``planner.PlannerModel``.
    """

    config: TDMPC2Config
    config_class = TDMPC2Config
    state_class = LatentState
    untrained = ("target_q", "scale")
    loss_hooks = ("model_loss", "policy_loss")
    views = ("compute_loss", "encode", "observe", "predict", "imagine")
    loss_terms: ClassVar[tuple[str, ...]] = losses.LOSS_TERMS
    uncertainty_units: ClassVar[Mapping[str, str]] = {"q_disagreement": "return"}

    encoder: VectorEncoder | ImageEncoder | JointEncoder
    dynamics: NormedMLP
    reward: NormedMLP
    termination: NormedMLP
    q: Ensemble
    target_q: Ensemble
    task_embedding: TaskEmbedding
    scale: ValueScale
    explorer: Disagreement  # Only with ``explore="disagreement"``.

    def single_task(self, task: int | str, *, obs_dim: int | None = None, action_dim: int | None = None) -> Self:
        """A single-task model that computes what this multitask one does for ``task``, a number or a name of mt30.

        Args:
          task: the task.
          obs_dim: width of the task's observations, which are filled up with zeros for this model; None is this
            model's.
          action_dim: likewise of its actions; None is what the task has.

        Raises ``ConfigError`` if there is no such task, or this model has a single one.
        """
        sizes = {"obs_dim": obs_dim, "action_dim": action_dim}
        config, params = single_task_weights(self.config, self.params, task, **sizes)
        model = type(self)(config)
        model.load_params(params)
        return model

    def single_task_weights(self, task: int | str, *, like: TDMPC2Config) -> tuple[TDMPC2Config, Any]:
        """Config and weights of :meth:`single_task` in the sizes of ``like``, as far as this model has them."""
        obs_dim = min(like.vector_dim, self.config.vector_dim) or None
        action_dim = min(like.action_dim, self.config.action_dim)
        return single_task_weights(self.config, self.params, task, obs_dim=obs_dim, action_dim=action_dim)

    @staticmethod
    def build(config: TDMPC2Config, dtype: jnp.dtype, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """Encoder, dynamics, reward, policy, q, target_q and scale; termination and task_embedding by the config.

        Q networks and their targets start as equal copies: both ensembles draw from the same key.
        """
        c = config
        z, za = c.latent_dim + c.embedding_dim, c.latent_dim + c.embedding_dim + c.action_dim
        hidden = [c.hidden_dim] * c.mlp_layers
        q_key = rngs.params()

        def q_network(rngs: nnx.Rngs) -> NormedMLP:
            return NormedMLP(za, hidden, c.num_bins, dropout=c.dropout, zero_head=True, dtype=dtype, rngs=rngs)

        parts: dict[str, nnx.Module] = {
            "encoder": make_encoder(c, dtype, rngs),
            "dynamics": NormedMLP(
                za, hidden, c.latent_dim, out_activation=SimNorm(c.simnorm_dim), dtype=dtype, rngs=rngs
            ),
            "reward": NormedMLP(za, hidden, c.num_bins, zero_head=True, dtype=dtype, rngs=rngs),
            "policy": (CategoricalPolicy if c.action_type == "discrete" else GaussianPolicy)(c, dtype, rngs),
            "q": Ensemble(q_network, c.num_q, key=q_key),
            "target_q": Ensemble(q_network, c.num_q, key=q_key),
            "scale": ValueScale(),
        }
        if c.episodic:
            parts["termination"] = NormedMLP(z, hidden, 1, dtype=dtype, rngs=rngs)
        if c.multitask:
            parts["task_embedding"] = TaskEmbedding(c, rngs)
        if c.explore == "disagreement":
            weight = c.explore_weight
            parts["explorer"] = Disagreement(
                za, c.latent_dim, width=c.hidden_dim, heads=c.explore_heads, weight=weight, dtype=dtype, rngs=rngs
            )
        return parts

    @property
    def policy_network(self) -> GaussianPolicy | CategoricalPolicy:
        """The part called ``policy`` in weights: ``model.policy`` itself is the method that makes an agent."""
        return vars(self)["policy"]

    # The interface that both families share.

    def initial_state(self, batch_size: int) -> LatentState:
        """Uninformative latents: uniform simplices, [batch_size, L]."""
        shape = (batch_size, self.config.latent_dim)
        return LatentState(jnp.full(shape, 1.0 / self.config.simnorm_dim, jnp.float32))

    @compiled
    def encode(self, obs: Any, key: jax.Array | None = None, *, task: jax.Array | None = None) -> LatentState:
        """Observations [B, *obs_shape], or a dict of such arrays, → latents [B, L].

        ``key`` shifts images at random, as in training.
        """
        return LatentState(self.latent(obs, task, key))

    @compiled
    def observe(
        self,
        state: LatentState,
        action: jax.Array,
        obs: Any,
        key: jax.Array | None = None,
        *,
        task: jax.Array | None = None,
    ) -> LatentState:
        """Latents [B, L] after acting and observing ``obs`` [B, *obs_shape].

        TD-MPC2 has no recurrent state: this encodes ``obs``; ``state`` and ``action`` are unused.
        """
        del state, action
        return LatentState(self.latent(obs, task, key))

    @compiled
    def predict(
        self, state: LatentState, action: jax.Array, key: jax.Array | None = None, *, task: jax.Array | None = None
    ) -> LatentState:
        """One imagined step: latents [B, L] and actions [B, A] or integers [B] → latents [B, L].

        The dynamics are deterministic; ``key`` is unused. Raises ``DataError`` for actions of another shape.
        """
        del key
        action = self.as_vectors(action, state.z.ndim)
        check_one_batch(state=state.z.shape[:-1], action=action.shape[:-1])
        return LatentState(self.next_latent(state.z, action, task))

    @compiled
    def imagine(
        self, state: LatentState, actions: jax.Array, key: jax.Array | None = None, *, task: jax.Array | None = None
    ) -> Trajectory:
        """Roll out ``actions`` [H, B, A] (or integers [H, B]) from ``state`` [B, L]; one scan.

        The dynamics are deterministic; ``key`` is unused. Raises ``DataError`` for actions of another shape.
        """
        del key
        actions = self.as_vectors(actions, state.z.ndim + 1)
        check_time_first(actions.shape[1:-1], state.z.shape[:-1])

        def step(z: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
            z = self.next_latent(z, action, task)
            return z, z

        _, later = jax.lax.scan(step, state.z, actions)
        zs = jnp.concatenate([state.z[None], later])
        rewards = self.decode_scalar(self.reward_logits(zs[:-1], actions, task))
        ended = jax.nn.sigmoid(self.termination_logits(later)) if self.config.episodic else jnp.zeros_like(rewards)
        return Trajectory(LatentState(zs), rewards, 1.0 - ended)

    @compiled
    def decode(self, state: LatentState, *, task: jax.Array | None = None) -> dict[str, jax.Array]:
        """Predictions from latents [..., L]: ``value`` [...] of the prior's mean action, in the units of the data.

        For ``episodic`` configs also ``continue`` and ``termination`` [...], probabilities that sum to 1. Observations
        are not decoded, and rewards need an action: :meth:`imagine` returns them.
        """
        action = self.prior(state.z, task).mean
        decoded = {"value": self.q_values(state.z, action, task, self.q_pair(None)).mean(0)}
        if self.config.episodic:
            ended = jax.nn.sigmoid(self.termination_logits(state.z))
            decoded |= {"termination": ended, "continue": 1.0 - ended}
        return decoded

    @compiled
    def compute_loss(self, batch: dict[str, Any], key: jax.Array | None = None) -> dict[str, jax.Array]:
        """``loss_terms`` of a batch [B, T, …] with T > ``horizon``, scalars; see :func:`prepare_batch` for its keys.

        ``loss`` is the model's total. ``policy`` has its own optimizer step and is not part of it; here it is computed
        with the current Q networks and value scale. Raises ``DataError`` for batches that do not fit the config.
        """
        prepared = prepare_batch(self.config, batch)
        model_key, policy_key = split_key(key, 2)
        of_model = self.model_loss(prepared, model_key)
        of_policy = self.policy_loss(of_model.rollouts, prepared.task, policy_key)
        terms = {"loss": of_model.total, **of_model.terms, **of_policy.metrics, "policy": of_policy.loss}
        return {name: terms[name] for name in self.loss_terms if name in terms}

    @compiled
    def uncertainty(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """``q_disagreement`` [B, T]: standard deviation of the Q networks at each row, in the units of the return.

        The ``num_q`` networks estimate the discounted return of the recorded action at the encoded observation. They
        start differently and see the same data, so they agree where there was much of it. Compare it with the spread
        of the values; the last row of an episode has no action, and its entry means nothing.

        Args:
          batch: ``obs`` [B, T, *obs_shape], ``actions`` [B, T, A] or integers [B, T]; multitask ``task`` [B].

        Raises ``DataError`` for arrays of another shape, or that are missing.
        """
        check_keys(batch, "obs", "actions")
        task = jnp.asarray(batch["task"])[:, None] if self.config.multitask and "task" in batch else None
        z, actions = self.latent(batch["obs"], task), self.as_vectors(batch["actions"], 3)
        return {"q_disagreement": self.q_values(z, actions, task, jnp.arange(self.config.num_q)).std(0)}

    @compiled
    def act(
        self,
        carry: jax.Array | None,
        obs: Any,
        key: jax.Array | None = None,
        *,
        task: jax.Array | None = None,
        is_first: jax.Array | None = None,
        explore: bool | jax.Array = True,
    ) -> tuple[jax.Array, jax.Array]:
        """Plan one action for each environment.

        Args:
          carry: [B, H, A] means of the previous plans, the warm start; None at the first step of all episodes.
          obs: [B, *obs_shape], or a dict of such arrays.
          key: key of candidates, prior, choice among elites and exploration; None takes the mode of each, hence no
            exploration.
          task: [B] for multitask models.
          is_first: [B], True where an episode starts: that plan has no warm start.
          explore: add exploration noise, as when collecting data; False for evaluation with sampled elites.

        Returns:
          carry: [B, H, A] for the next call.
          action: [B, A] in [−1, 1], or integers [B].

        Raises:
          DataError: ``obs`` has no batch axis, ``explore`` is an array, or something is of other environments.
        """
        encode_key, plan_key = split_key(key, 2)
        check_batch_axis(self.config, obs)
        z = self.latent(obs, task, encode_key)
        is_first = None if is_first is None else jnp.asarray(is_first, bool)
        check_what_acts(z.shape[0], carry, is_first, task, explore)
        if carry is None:
            carry = jnp.zeros((z.shape[0], self.config.horizon, self.config.action_dim), jnp.float32)
        if is_first is not None:
            carry = jnp.where(is_first[:, None, None], 0.0, carry)
        if self.config.mpc:
            action, carry = planner.plan(self, z, carry, plan_key, task=task, explore=explore)
        else:
            sample = self.prior(z, task, plan_key)
            action = jnp.where(explore, sample.action, sample.mean)
        return carry, jnp.argmax(action, axis=-1) if self.config.action_type == "discrete" else action

    # The losses of training. Not compiled by themselves: the update that calls them is.

    def model_loss(self, batch: TrainBatch, key: jax.Array | None = None, *, remat: bool = False) -> ModelLoss:
        """Loss of everything but the policy, see :func:`worldloom.models.tdmpc2.losses.model_loss`."""
        return losses.model_loss(self, batch, key, remat=remat)

    def policy_loss(
        self,
        rollouts: Rollouts,
        task: jax.Array | None,
        key: jax.Array | None = None,
        *,
        scale: jax.Array | None = None,
        remat: bool = False,
    ) -> PolicyLoss:
        """Loss of the policy prior, see :func:`worldloom.models.tdmpc2.losses.policy_loss`."""
        return losses.policy_loss(self, rollouts, task, key, scale=scale, remat=remat)

    # Networks as functions of latents [..., L]; ``task`` broadcasts against their batch axes.

    def latent(self, obs: Any, task: jax.Array | None, key: jax.Array | None = None) -> jax.Array:
        """Observations [..., *obs_shape], or a dict of them, → [..., L].

        Raises ``DataError`` for other names, shapes or dtypes.
        """
        prepared, lead = prepare_observations(self.config, obs)
        return self.encoder(prepared, self.embed(task, lead), key)

    def next_latent(self, z: jax.Array, action: jax.Array, task: jax.Array | None) -> jax.Array:
        """[..., L] after ``action`` [..., A]."""
        return self.dynamics(self._join(z, task, action))

    def reward_logits(self, z: jax.Array, action: jax.Array, task: jax.Array | None) -> jax.Array:
        """[..., K] of the reward for ``action`` at ``z``."""
        return self.reward(self._join(z, task, action))

    def fused_dynamics_reward(self, task: jax.Array | None) -> FusedDynamicsReward:
        """Dynamics and reward in one, for many actions and one ``task`` []: the planner's inner loop."""
        return FusedDynamicsReward(self.dynamics, self.reward, self.embed(task, ()), self.config.latent_dim)

    def termination_logits(self, z: jax.Array) -> jax.Array:
        """Logits [...] of ``z`` being terminal; for ``episodic`` configs only, which have one task."""
        return self.termination(z)[..., 0]

    def prior(
        self, z: jax.Array, task: jax.Array | None, key: jax.Array | None = None, noise: jax.Array | None = None
    ) -> GaussianSample | CategoricalSample:
        """A sample of the policy prior at ``z``; ``noise`` [..., A] replaces its draw."""
        return self.policy_network(self._join(z, task), self.action_mask(task), key, noise)

    def q_logits(
        self,
        z: jax.Array,
        action: jax.Array,
        task: jax.Array | None,
        key: jax.Array | None = None,
        *,
        members: jax.Array | None = None,
        target: bool = False,
    ) -> jax.Array:
        """Logits [N, ..., K] of all Q networks, or [n, ..., K] of ``members`` [n]; a key turns their dropout on."""
        return (self.target_q if target else self.q)(self._join(z, task, action), key, members=members)

    def q_values(
        self,
        z: jax.Array,
        action: jax.Array,
        task: jax.Array | None,
        members: jax.Array,
        key: jax.Array | None = None,
        *,
        target: bool = False,
    ) -> jax.Array:
        """Values [n, ...] of the Q networks ``members`` [n], in the units of the data."""
        return self.decode_scalar(self.q_logits(z, action, task, key, members=members, target=target))

    def q_pair(self, key: jax.Array | None) -> jax.Array:
        """Indices [2] of two different Q networks, uniform over ordered pairs; the first two without a key."""
        if key is None:
            return jnp.arange(2)
        # A first index in [0, N) and a step in [1, N) from it, modulo N.
        first, step = jax.random.randint(
            key, (2,), jnp.zeros(2, int), jnp.array([self.config.num_q, self.config.num_q - 1])
        )
        return jnp.stack([first, (first + 1 + step) % self.config.num_q])

    def decode_scalar(self, logits: jax.Array) -> jax.Array:
        """Logits [..., K] of a reward or value → [...] in the units of the data."""
        return symlog_twohot.decode(logits, vmin=self.config.vmin, vmax=self.config.vmax)

    def two_hot(self, x: jax.Array) -> jax.Array:
        """Rewards or values [...] → target weights [..., K]."""
        c = self.config
        return symlog_twohot.two_hot(x, num_bins=c.num_bins, vmin=c.vmin, vmax=c.vmax)

    def explorer_loss(
        self, z: jax.Array, action: jax.Array, task: jax.Array | None, next_z: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Errors and spread [...] of the explorer's predictions of ``next_z``; with ``explore="disagreement"`` only."""
        x = self._join(z, task, action)
        return self.explorer.errors(x, next_z), self.explorer.spread(x)

    def intrinsic_reward(self, z: jax.Array, action: jax.Array, task: jax.Array | None) -> jax.Array:
        """Intrinsic reward [...] for ``action`` [..., A] at ``z``; with ``explore="disagreement"`` only."""
        return self.explorer.reward(self._join(z, task, action))

    def gamma(self, task: jax.Array | None) -> jax.Array:
        """Discount γ: a scalar, or one for each entry of ``task``."""
        discounts = jnp.asarray(self.config.discounts, jnp.float32)
        return discounts[task] if self.config.multitask else discounts[0]

    def action_mask(self, task: jax.Array | None) -> jax.Array:
        """float32 [A], or [..., A] with the axes of ``task``: 1 for dimensions that the task has, 0 for others."""
        masks = self.config.action_masks  # A constant: every program drops products with ones, and rounds alike.
        return jnp.asarray(masks)[task] if self.config.multitask else jnp.asarray(masks[0])

    def embed(self, task: jax.Array | None, batch_shape: tuple[int, ...]) -> jax.Array:
        """Task embeddings [*batch_shape, E]; of width 0 for a single-task model.

        Raises ``DataError`` for a ``task`` that is missing, of another shape, or of a model that has a single one.
        """
        check_tasks_fit(self.config, task, batch_shape)
        if task is None:
            return jnp.zeros((*batch_shape, 0), jnp.float32)
        return jnp.broadcast_to(self.task_embedding(jnp.asarray(task)), (*batch_shape, self.config.embedding_dim))

    def as_vectors(self, actions: jax.Array, ndim: int) -> jax.Array:
        """Actions as [..., A] float32 with ``ndim`` axes; integers of discrete actions become one-hots.

        Raises ``DataError`` for another number of axes or another width.
        """
        actions = jnp.asarray(actions)
        if self.config.action_type == "discrete" and actions.ndim == ndim - 1:
            return jax.nn.one_hot(actions, self.config.action_dim, dtype=jnp.float32)
        if actions.ndim != ndim or actions.shape[-1] != self.config.action_dim:
            raise DataError(
                f"Actions have shape {actions.shape}; {ndim} axes, the last of {self.config.action_dim}, are needed."
            )
        return actions.astype(jnp.float32)

    def _join(self, z: jax.Array, task: jax.Array | None, *action: jax.Array) -> jax.Array:
        return jnp.concatenate([z, self.embed(task, z.shape[:-1]), *action], axis=-1)
