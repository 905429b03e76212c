"""The DreamerV3 world model with its actor and critic."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from worldloom.describe import described_fields
from worldloom.models.base import (
    WorldModel,
    check_environments,
    check_one_batch,
    check_time_first,
    compiled,
)
from worldloom.models.disagreement import Disagreement
from worldloom.models.dreamer.arrays import (
    embed_actions,
    prepare_observations,
    restore_observations,
    unwrap_single_action,
)
from worldloom.models.dreamer.batch import prepare_batch
from worldloom.models.dreamer.config import DreamerV3Config
from worldloom.models.dreamer.losses import LOSS_TERMS, LossOutput, loss
from worldloom.models.dreamer.networks import Actor, Decoder, Encoder, Head, ReturnRange
from worldloom.models.dreamer.rssm import RSSM, Latent
from worldloom.ops.distributions import OneHot, sample_actions
from worldloom.ops.keys import split_key
from worldloom.ops.symexp_twohot import symexp_twohot_mean


class Trajectory(NamedTuple):
    """An imagined future, time-major.

    Attributes:
      states: [H + 1, B, ...]; row 0 is the initial state.
      rewards: predicted rewards of arriving at states 1 … H, [H, B].
      continues: predicted probabilities (times 1 − 1 / ``return_horizon``) that the episode continues there, [H, B].
    """

    states: Latent
    rewards: jax.Array
    continues: jax.Array

    def __repr__(self) -> str:
        return described_fields(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActorCarry:
    """The state of acting between two steps of B environments.

    Attributes:
      latent: state after the last observation, [B, ...].
      action: the last action, embedded [B, A].
      is_first: true where the next observation starts an episode, bool [B].
    """

    latent: Latent
    action: jax.Array
    is_first: jax.Array


class DreamerV3WorldModel(WorldModel):
    """DreamerV3: encoder, RSSM, decoder, reward and continue heads, actor, critic and its slow copy.

    See :class:`worldloom.WorldModel` for the constructor. Observations are arrays (or dicts) of ``config.obs_shape``
    with leading batch axes, actions are described by ``config.action_dim``; ``key=None`` takes modes throughout.
    """

    config_class = DreamerV3Config
    state_class = Latent
    untrained = ("slow_critic", "return_range")
    loss_hooks = ("losses",)
    views = ("compute_loss", "encode", "observe", "predict", "imagine")
    loss_terms: ClassVar[tuple[str, ...]] = LOSS_TERMS
    """Names of the scalars of :meth:`compute_loss`, the total first."""
    uncertainty_units: ClassVar[Mapping[str, str]] = {"kl": "nats"}

    config: DreamerV3Config
    encoder: Encoder
    rssm: RSSM
    decoder: Decoder
    reward: Head
    continuation: Head  # The continue head; the attribute stays, because saved weights are named after it.
    actor: Actor
    critic: Head
    slow_critic: Head
    return_range: ReturnRange
    explorer: Disagreement  # Only with ``explore="disagreement"``.

    @staticmethod
    def build(config: DreamerV3Config, dtype: jnp.dtype, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """The parts by name; the slow critic starts as a copy of the critic."""
        encoder = Encoder(config, dtype, rngs=rngs)
        critic = Head(config, config.mlp_layers, config.bins, scale=0.0, rngs=rngs)
        parts: dict[str, nnx.Module] = {
            "encoder": encoder,
            "rssm": RSSM(config, encoder.output_dim, rngs=rngs),
            "decoder": Decoder(config, rngs=rngs),
            "reward": Head(config, config.reward_layers, config.bins, scale=0.0, rngs=rngs),
            "continuation": Head(config, config.continue_layers, 1, rngs=rngs),
            "actor": Actor(config, rngs=rngs),
            "critic": critic,
            "slow_critic": nnx.clone(critic),
            "return_range": ReturnRange(),
        }
        if config.explore == "disagreement":
            parts["explorer"] = Disagreement(
                config.feature_dim + config.action_width,
                config.stoch_dim,
                width=config.width,
                heads=config.explore_heads,
                weight=config.explore_weight,
                dtype=dtype,
                rngs=rngs,
            )
        return parts

    def initial_state(self, batch_size: int) -> Latent:
        """The state before any observation: zeros [B, ...]."""
        return zero_carry(self.config, batch_size, self.dtype).latent

    def initial_carry(self, batch_size: int) -> ActorCarry:
        """The carry of :meth:`act` before the first observation of B environments."""
        return zero_carry(self.config, batch_size, self.dtype)

    @compiled
    def encode(self, obs: Any, key: jax.Array | None = None) -> Latent:
        """State [B, ...] after the first observation [B, ...] of an episode."""
        obs = prepare_observations(self.config, obs, 1)
        batch_size = next(iter(obs.values())).shape[0]
        return self._posterior(self.initial_carry(batch_size), obs, key)

    @compiled
    def observe(self, state: Latent, action: Any, obs: Any, key: jax.Array | None = None) -> Latent:
        """State [B, ...] after acting [B, ...] in ``state`` and seeing ``obs`` [B, ...]."""
        obs = prepare_observations(self.config, obs, 1)
        action = embed_actions(self.config, action, 1, self.dtype)
        windows = next(iter(obs.values())).shape[:1]
        check_one_batch(obs=windows, state=state.deter.shape[:-1], action=action.shape[:-1])
        return self._posterior(ActorCarry(state, action, jnp.zeros(action.shape[0], bool)), obs, key)

    @compiled
    def predict(self, state: Latent, action: Any, key: jax.Array | None = None) -> Latent:
        """State [B, ...] imagined after acting [B, ...] in ``state``."""
        embedded = embed_actions(self.config, action, 1, self.dtype)
        check_one_batch(state=state.deter.shape[:-1], action=embedded.shape[:-1])
        return self.rssm.predict(state, embedded, self.rssm.sampling_uniforms(key, embedded.shape[0]))

    @compiled
    def imagine(self, state: Latent, actions: Any, key: jax.Array | None = None) -> Trajectory:
        """The future predicted for ``actions`` [H, B, ...] from ``state`` [B, ...], one ``lax.scan``.

        Raises ``DataError`` for actions of another shape.
        """
        embedded = embed_actions(self.config, actions, 2, self.dtype)
        check_time_first(embedded.shape[1:-1], state.deter.shape[:-1])
        kernels = self.rssm.core.split_kernel()

        def step(state: Latent, inputs: tuple) -> tuple[Latent, Latent]:
            action, uniforms = inputs
            state = self.rssm.predict(state, action, uniforms, kernels)
            return state, state

        uniforms = self.rssm.sampling_uniforms(key, *embedded.shape[:2])
        _, later = jax.lax.scan(step, state, (embedded, uniforms))
        states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), state, later)
        features = later.features
        return Trajectory(states, self.predict_reward(features), self.predict_continue(features))

    @compiled
    def decode(self, state: Latent) -> dict[str, Any]:
        """Predictions from ``state`` [...]: observation, reward of arriving there, continue, value.

        ``obs`` has the layout of ``config.obs_shape``: vectors in their own units, images from 0 to 1. ``continue``
        is a probability times 1 − 1 / ``return_horizon``.
        """
        features = state.features
        return {
            "obs": restore_observations(self.config, self.decoder(state)),
            "reward": self.predict_reward(features),
            "continue": self.predict_continue(features),
            "value": symexp_twohot_mean(self.critic(features)),
        }

    def losses(
        self,
        batch: Mapping[str, Any],
        key: jax.Array | None = None,
        *,
        scale: jax.Array | None = None,
        remat: bool = False,
    ) -> LossOutput:
        """The loss of a batch [B, T, ...] with its terms and states: what training minimises, to be traced.

        A subclass overrides this method to change the loss. Arguments as for
        :func:`worldloom.models.dreamer.losses.loss`.
        """
        return loss(self, batch, key, scale=scale, remat=remat)

    @compiled
    def compute_loss(self, batch: Mapping[str, Any], key: jax.Array | None = None) -> dict[str, jax.Array]:
        """The loss terms of a batch [B, T, ...] as scalars; ``"loss"`` is their weighted sum."""
        return self.losses(batch, key).terms

    @compiled
    def act(
        self, carry: ActorCarry | None, obs: Any, key: jax.Array | None = None, *, is_first: jax.Array | None = None
    ) -> tuple[ActorCarry, Any]:
        """Update the state with ``obs`` [B, ...] and sample actions [B, ...] from the policy.

        Args:
          carry: what the previous call returned; None at the start.
          obs: the observations just received.
          key: for sampling latents and actions as in training; None takes the modes of both.
          is_first: bool [B]; true where ``obs`` starts a new episode, which resets the state there.

        Returns:
          The new carry and the actions: int32 [B] where discrete, float32 [B, A] where continuous (not clipped).
        """
        obs = prepare_observations(self.config, obs, 1)
        count = next(iter(obs.values())).shape[0]
        is_first = None if is_first is None else jnp.asarray(is_first, bool)
        check_environments(count, None if carry is None else carry.is_first.shape[0], is_first)
        carry = carry or self.initial_carry(count)
        if is_first is not None:
            carry = dataclasses.replace(carry, is_first=carry.is_first | is_first)
        latent_key, action_key = split_key(key)
        latent = self._posterior(carry, obs, latent_key)
        action = unwrap_single_action(self.config, sample_actions(self.actor(latent.features), action_key))
        embedded = embed_actions(self.config, action, 1, self.dtype)
        return ActorCarry(latent, embedded, jnp.zeros_like(carry.is_first)), action

    @property
    def continue_discount(self) -> float:
        """1 − 1 / ``return_horizon``, which the continue head is trained to include."""
        return 1 - 1 / self.config.return_horizon

    @compiled
    def uncertainty(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """``kl`` [B, T]: how much each row surprised the model, KL(posterior ‖ prior) in nats, from modes.

        It is the divergence that the loss terms ``dynamics`` and ``representation`` minimise, before its floor
        ``kl_free``: what the model would have had to know to predict the row's latent. It is summed over the latents
        and thus at most ``num_latents`` · log(``num_categories`` / ``unimix``). Sequences start from an empty memory,
        also in the middle of an episode, so the first rows of a window are high. A stored ``context`` is not used.

        Raises ``DataError`` for batches that do not fit the config.
        """
        rows = prepare_batch(self.config, {k: v for k, v in batch.items() if k != "context"}, self.dtype)
        initial = self.initial_state(len(rows.rewards))
        tokens = self.encoder(rows.obs)
        latents, logits = self.rssm.observe(initial, tokens, rows.previous_actions, rows.is_first, None)
        posterior = OneHot.from_logits(logits, self.config.unimix)
        return {"kl": posterior.kl(OneHot.from_logits(self.rssm.prior(latents.deter), self.config.unimix))}

    def predict_reward(self, features: jax.Array) -> jax.Array:
        """Expected reward [...] of arriving at features [..., F]."""
        return symexp_twohot_mean(self.reward(features))

    def predict_continue(self, features: jax.Array) -> jax.Array:
        """Discount [...] after features [..., F]: probability of continuing, times 1 − 1 / ``return_horizon``."""
        return jax.nn.sigmoid(self.continuation(features)[..., 0])

    def _posterior(self, carry: ActorCarry, obs: dict[str, jax.Array], key: jax.Array | None) -> Latent:
        # A sequence of one row, so that acting and training share all code.
        tokens, action, is_first = (x[:, None] for x in (self.encoder(obs), carry.action, carry.is_first))
        states, _ = self.rssm.observe(carry.latent, tokens, action, is_first, key)
        return jax.tree.map(lambda x: x[:, 0], states)


def zero_carry(config: DreamerV3Config, batch_size: int, dtype: jnp.dtype) -> ActorCarry:
    """Zero state, zero action, and ``is_first`` set in each of B environments."""
    deter = jnp.zeros((batch_size, config.deter_dim), dtype)
    stoch = jnp.zeros((batch_size, config.num_latents, config.num_categories), dtype)
    action = jnp.zeros((batch_size, config.action_width), dtype)
    return ActorCarry(Latent(deter, stoch), action, jnp.ones(batch_size, bool))
