"""The DreamerV3 world model with its actor and critic."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from worldloom.models.base import WorldModel, check_environments, check_time_first, compiled
from worldloom.models.dreamer.config import DreamerV3Config
from worldloom.models.dreamer.networks import Actor, Decoder, Encoder, Head, ReturnRange
from worldloom.models.dreamer.rssm import RSSM, Latent
from worldloom.models.dreamer.spaces import embed_actions, prepare_observations, restore_observations, strip_single
from worldloom.ops.distributions import draw
from worldloom.ops.keys import split_key
from worldloom.ops.symexp_twohot import symexp_twohot_mean


class Trajectory(NamedTuple):
    """An imagined future, time-major.

    Attributes:
      states: [H + 1, B, ...]; row 0 is the state it started from.
      rewards: predicted rewards of arriving at states 1 … H, [H, B].
      continues: predicted probabilities (times 1 − 1 / ``return_horizon``) that the episode goes on there, [H, B].
    """

    states: Latent
    rewards: jax.Array
    continues: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActorCarry:
    """What acting remembers between two steps of B environments.

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
    untrained = ("slow_critic", "return_range")

    config: DreamerV3Config
    encoder: Encoder
    rssm: RSSM
    decoder: Decoder
    reward: Head
    continuation: Head
    actor: Actor
    critic: Head
    slow_critic: Head
    return_range: ReturnRange

    @staticmethod
    def build(config: DreamerV3Config, dtype: jnp.dtype, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """The parts by name; the slow critic starts as a copy of the critic."""
        encoder = Encoder(config, dtype, rngs=rngs)
        critic = Head(config, config.mlp_layers, config.bins, scale=0.0, rngs=rngs)
        return {
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

    @property
    def algorithm(self) -> types.ModuleType:
        """``worldloom.models.dreamer``."""
        from worldloom.models import dreamer

        return dreamer

    def initial_state(self, batch_size: int) -> Latent:
        """The state before any observation: zeros [B, ...]."""
        return zero_carry(self.config, batch_size, self.dtype).latent

    def initial_carry(self, batch_size: int) -> ActorCarry:
        """What :meth:`act` starts from when all B environments are about to show their first observation."""
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
        return self._posterior(ActorCarry(state, action, jnp.zeros(action.shape[0], bool)), obs, key)

    @compiled
    def predict(self, state: Latent, action: Any, key: jax.Array | None = None) -> Latent:
        """State [B, ...] imagined after acting [B, ...] in ``state``."""
        embedded = embed_actions(self.config, action, 1, self.dtype)
        return self.rssm.predict(state, embedded, self.rssm.noise(key, len(embedded)))

    @compiled
    def imagine(self, state: Latent, actions: Any, key: jax.Array | None = None) -> Trajectory:
        """What following ``actions`` [H, B, ...] from ``state`` [B, ...] leads to, one ``lax.scan``.

        Raises ``DataError`` for actions of another shape.
        """
        embedded = embed_actions(self.config, actions, 2, self.dtype)
        check_time_first(embedded.shape[1:-1], state.deter.shape[:-1])
        mixing = self.rssm.core.mixing(self.dtype)

        def step(state: Latent, inputs: tuple) -> tuple[Latent, Latent]:
            action, noise = inputs
            state = self.rssm.predict(state, action, noise, mixing)
            return state, state

        _, later = jax.lax.scan(step, state, (embedded, self.rssm.noise(key, *embedded.shape[:2])))
        states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), state, later)
        features = later.features
        return Trajectory(states, self.predict_reward(features), self.predict_continue(features))

    @compiled
    def decode(self, state: Latent) -> dict[str, Any]:
        """What the model expects in ``state`` [..., ]: observation, reward of arriving there, continue, value.

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

    @compiled
    def compute_loss(self, batch: Mapping[str, Any], key: jax.Array | None = None) -> dict[str, jax.Array]:
        """The loss terms of a batch [B, T, ...] as scalars; ``"loss"`` is their weighted sum."""
        from worldloom.models.dreamer.loss import loss

        return loss(self, batch, key)[1][0]

    @compiled
    def act(
        self, carry: ActorCarry | None, obs: Any, key: jax.Array | None = None, *, is_first: jax.Array | None = None
    ) -> tuple[ActorCarry, Any]:
        """Take in ``obs`` [B, ...] and choose actions [B, ...] by the policy.

        Args:
          carry: what the call before returned; None at the start.
          obs: the observations just received.
          key: draws latents and actions as in training; None takes the modes of both.
          is_first: bool [B]; true where ``obs`` starts a new episode, whose memory is then cleared.

        Returns:
          The new carry and the actions: int32 [B] where discrete, float32 [B, A] where continuous (not clipped).
        """
        obs = prepare_observations(self.config, obs, 1)
        count = next(iter(obs.values())).shape[0]
        check_environments(count, None if carry is None else len(carry.is_first), is_first)
        carry = carry or self.initial_carry(count)
        if is_first is not None:
            carry = dataclasses.replace(carry, is_first=carry.is_first | jnp.asarray(is_first, bool))
        latent_key, action_key = split_key(key)
        latent = self._posterior(carry, obs, latent_key)
        action = strip_single(self.config, draw(self.actor(latent.features), action_key))
        embedded = embed_actions(self.config, action, 1, self.dtype)
        return ActorCarry(latent, embedded, jnp.zeros_like(carry.is_first)), action

    def predict_reward(self, features: jax.Array) -> jax.Array:
        """Expected reward [...] of arriving at features [..., F]."""
        return symexp_twohot_mean(self.reward(features))

    def predict_continue(self, features: jax.Array) -> jax.Array:
        """Probability [...] that the episode goes on after features [..., F], times 1 − 1 / ``return_horizon``."""
        return jax.nn.sigmoid(self.continuation(features)[..., 0])

    def _posterior(self, carry: ActorCarry, obs: dict[str, jax.Array], key: jax.Array | None) -> Latent:
        # A sequence of one row, so that acting and training share every line.
        tokens, action, is_first = (x[:, None] for x in (self.encoder(obs), carry.action, carry.is_first))
        states, _ = self.rssm.observe(carry.latent, tokens, action, is_first, key)
        return jax.tree.map(lambda x: x[:, 0], states)


def zero_carry(config: DreamerV3Config, batch_size: int, dtype: jnp.dtype) -> ActorCarry:
    """Zero state, no action, and an episode about to start in each of B environments."""
    deter = jnp.zeros((batch_size, config.deter_dim), dtype)
    stoch = jnp.zeros((batch_size, config.num_latents, config.num_categories), dtype)
    action = jnp.zeros((batch_size, config.action_width), dtype)
    return ActorCarry(Latent(deter, stoch), action, jnp.ones(batch_size, bool))
