"""The loss of DreamerV3: world model, imagination, actor and critic, replayed returns, in the paper's order.

Names in parentheses are those of danijar/dreamerv3, ``dreamerv3/agent.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from worldloom.models.base import check_new_term
from worldloom.models.disagreement import Disagreement
from worldloom.models.dreamer.arrays import embed_actions, unwrap_single_action
from worldloom.models.dreamer.batch import TrainBatch, prepare_batch
from worldloom.models.dreamer.config import DreamerV3Config
from worldloom.models.dreamer.networks import Actor, Decoder, Encoder, Head, ReturnRange, unit_range
from worldloom.models.dreamer.rssm import RSSM, Latent
from worldloom.ops.distributions import (
    Categorical,
    Normal,
    OneHot,
    binary_cross_entropy,
    sample_actions,
    symlog_squared_error,
)
from worldloom.ops.keys import split_key, step_keys
from worldloom.ops.returns import lambda_return
from worldloom.ops.symexp_twohot import symexp_twohot_loss, symexp_twohot_mean

LOSS_TERMS = (
    "loss",
    "reconstruction",
    "reward",
    "continue",
    "dynamics",
    "representation",
    "actor",
    "critic",
    "replay_critic",
)
sg = jax.lax.stop_gradient
Policy = Mapping[str, Normal | Categorical]


class LossModel(Protocol):
    """The parts of a model that the loss uses: what a subclass with other networks must provide.

    It must be an ``nnx.Module``, since imagination runs in a copy of it without gradients.
    """

    config: DreamerV3Config
    dtype: jnp.dtype
    encoder: Encoder
    rssm: RSSM
    decoder: Decoder
    reward: Head
    continuation: Head  # The continue head; the attribute is the name of its weights in saved models.
    actor: Actor
    critic: Head
    slow_critic: Head
    return_range: ReturnRange
    explorer: Disagreement  # Used with ``explore="disagreement"`` only.

    def initial_state(self, batch_size: int) -> Latent:
        """The state before any observation, [B, ...]."""

    def predict_reward(self, features: jax.Array) -> jax.Array:
        """Expected reward [...] of arriving at features [..., F]."""

    def predict_continue(self, features: jax.Array) -> jax.Array:
        """Discount [...] after features [..., F]: probability of continuing, times 1 − 1 / ``return_horizon``."""


class LossOutput(NamedTuple):
    """What :func:`loss` computes from a batch of T rows that count, with K ≤ T starts of imagination a window.

    Attributes:
      total: the weighted sum of the terms, []: what is minimised.
      terms: scalars by name, those of ``LOSS_TERMS``: the total under ``"loss"``, and each term's plain mean.
      elements: each term before its mean: [B, T], ``actor`` and ``critic`` [H, B·K], ``replay_critic`` [B, K − 1].
      latents: posterior states [B, T, ...].
      posterior_logits: logits of those states, [B, T, S, C].
      returns: imagined λ-returns, [H, B·K].
      return_range: the moved percentiles ``{"lo": [], "hi": []}``.
      metrics: further scalars by name.
    """

    total: jax.Array
    terms: dict[str, jax.Array]
    elements: dict[str, jax.Array]
    latents: Latent
    posterior_logits: jax.Array
    returns: jax.Array
    return_range: dict[str, jax.Array]
    metrics: dict[str, jax.Array]

    def add_term(self, name: str, elements: jax.Array, scale: float = 1.0) -> LossOutput:
        """With a further term: the mean of ``elements`` [...] under ``name``, ``scale`` times that in the total.

        For a subclass that overrides ``losses``; it lists the name in its ``loss_terms``.
        """
        check_new_term(name, self.terms)
        term = jnp.mean(elements)
        total = self.total + scale * term
        terms = self.terms | {"loss": total, name: term}
        return self._replace(total=total, terms=terms, elements=self.elements | {name: elements})


def loss(
    model: LossModel,
    batch: Mapping[str, Any],
    key: jax.Array | None,
    *,
    scale: jax.Array | None = None,
    remat: bool = False,
) -> LossOutput:
    """The loss of a batch [B, T, ...] (``Agent.loss``; the paper's world model, critic and actor losses).

    One backward pass trains all parts; the stop-gradients here decide which part learns from which term.

    Args:
      model: the model.
      batch: as :func:`worldloom.models.dreamer.batch.prepare_batch` describes it.
      key: for sampling (consumed); None takes the mode of every distribution.
      scale: fixed advantage scale, []; if None, computed from this batch's returns.
      remat: keep no activations of the networks for the backward pass; recompute them there.

    Raises:
      DataError: the batch lacks a key, or a shape does not fit.
    """
    maybe_remat = jax.checkpoint if remat else lambda network: network
    config, rows = model.config, prepare_batch(model.config, batch, model.dtype)
    batch_size, length = rows.rewards.shape
    observe_key, imagine_key = split_key(key)
    losses: dict[str, jax.Array] = {}

    # World model: infer the states of all rows, and predict each row from its state.
    tokens = maybe_remat(model.encoder)(rows.obs)
    initial = rows.initial or model.initial_state(batch_size)
    latents, logits = model.rssm.observe(
        initial, tokens, rows.previous_actions, rows.is_first, observe_key, remat=remat
    )
    posterior = OneHot.from_logits(logits, config.unimix)
    prior = OneHot.from_logits(model.rssm.prior(latents.deter), config.unimix)
    features = latents.features
    discount = 1 - 1 / config.return_horizon
    losses["reconstruction"] = reconstruction_loss(maybe_remat(model.decoder)(latents), rows.obs)
    losses["reward"] = symexp_twohot_loss(maybe_remat(model.reward)(features), rows.rewards)
    continue_logit = maybe_remat(model.continuation)(features)[..., 0]
    losses["continue"] = binary_cross_entropy(continue_logit, discount * (1 - rows.is_terminal))
    losses["dynamics"] = jnp.maximum(sg(posterior).kl(prior), config.kl_free)
    losses["representation"] = jnp.maximum(posterior.kl(sg(prior)), config.kl_free)

    # Imagination: the policy acts in the world model from each window's last K states, both without gradients.
    graph, weights = nnx.split(model)
    frozen: LossModel = nnx.merge(graph, sg(weights))
    num_starts = min(config.imagination_starts or length, length)
    starts = jax.tree.map(lambda x: sg(x[:, -num_starts:]).reshape(-1, *x.shape[2:]), latents)
    dream_features, actions, products = imagine(frozen, starts, config.imagination_horizon, imagine_key)

    # Actor and critic learn from the imagined returns. Heads see all H + 1 states and their results are cut, because
    # cutting the features would copy the largest array there is. The actor's first product is known from imagination.
    policy = maybe_remat(model.actor.after_first_matmul)(model.actor.first_matmul(dream_features, known=products))
    critic_logits = maybe_remat(model.critic)(dream_features)
    rewards = frozen.predict_reward(dream_features)[1:]
    continues = frozen.predict_continue(dream_features)
    replayed_rewards, exploring = rows.rewards, {}
    if config.explore == "disagreement":
        bonus = exploration(model, frozen, latents, rows, dream_features, actions)
        losses["disagreement"], exploring = bonus.errors, {"explore_spread": bonus.spread, "explore_rows": bonus.rows}
        rewards, replayed_rewards = rewards + bonus.imagined, replayed_rewards + bonus.replayed
    values = symexp_twohot_mean(sg(critic_logits))
    returns = lambda_return(rewards, continues[1:], values[1:], config.return_lambda)
    percentiles = {"lo": model.return_range.lo[...], "hi": model.return_range.hi[...]}
    return_range, batch_scale = update_return_range(percentiles, returns, config.return_range_rate)
    scale = sg(batch_scale) if scale is None else scale
    # Probability that the episode has lasted until then, times the discount: later steps count less.
    weight = jnp.cumprod(continues, 0)[:-1]
    slow_values = symexp_twohot_mean(frozen.slow_critic(dream_features))
    advantages = sg(returns - values[:-1]) / scale
    losses["actor"] = weight * actor_loss(policy, actions, advantages, config.entropy_scale)
    targets = jnp.concatenate([returns, values[-1:]])
    losses["critic"] = weight * critic_loss(critic_logits, targets, slow_values, config.slow_critic_scale)[:-1]

    # The critic also learns from replayed rewards, with the imagined returns as its bootstrap.
    bootstrap = returns[0].reshape(batch_size, num_starts)
    replayed = (x[:, -num_starts:] for x in (features, replayed_rewards, rows.is_terminal, rows.is_last))
    features_replayed, rewards_replayed, is_terminal, is_last = replayed
    targets = replay_return(rewards_replayed, is_terminal, is_last, bootstrap, discount, config.return_lambda)
    slow_values = symexp_twohot_mean(frozen.slow_critic(sg(features_replayed[:, :-1])))
    critic_logits = maybe_remat(model.critic)(features_replayed[:, :-1])
    # The row after an episode's last belongs to the next episode: there is no return to learn.
    losses["replay_critic"] = (1 - is_last[:, :-1]) * critic_loss(
        critic_logits, targets, slow_values, config.slow_critic_scale
    )

    # Total: every term's mean, weighted.
    _assert_shapes(losses, (batch_size, length), (config.imagination_horizon, batch_size * num_starts))
    terms = {name: jnp.mean(value) for name, value in losses.items()}
    scales = loss_scales(config)
    total = sum((scales[name] * terms[name] for name in terms), jnp.zeros(()))
    metrics = {
        "policy_entropy": jnp.mean(entropy(policy)),
        "posterior_entropy": jnp.mean(posterior.entropy()),
        "prior_entropy": jnp.mean(prior.entropy()),
        "imagined_reward": jnp.mean(rewards),
        "imagined_return": jnp.mean(returns),
        "return_scale": scale,
        **exploring,
    }
    return LossOutput(total, {"loss": total, **terms}, losses, latents, logits, returns, return_range, metrics)


def imagine(
    model: LossModel, starts: Latent, horizon: int, key: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """Let the policy act in the world model, one ``lax.scan`` (``RSSM.imagine`` with a policy).

    Args:
      model: the model.
      starts: N states [N, ...].
      horizon: steps H.
      key: for sampling actions and latents (consumed); None takes the modes.

    Returns:
      Features [H + 1, N, F], the first those of ``starts``; the sampled actions at each by name, [H + 1, N, ...]; the
      product of the actor's first kernel with each, [H + 1, N, U].
    """
    kernels = model.rssm.core.split_kernel()
    # Each step writes its features into this buffer, which the heads then read. Collecting them as the scan's outputs
    # and prepending the first would copy them twice.
    write = jax.lax.dynamic_update_index_in_dim
    first = starts.features
    dream = write(jnp.zeros((horizon + 1, *first.shape), model.dtype), first, 0, 0)

    def act(features: jax.Array, key: jax.Array | None) -> tuple[dict[str, jax.Array], jax.Array]:
        product = model.actor.first_matmul(features)
        return sample_actions(model.actor.after_first_matmul(product), key), product

    def step(carry: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        (state, features, dream), (index, key, uniforms) = carry, inputs
        actions, product = act(features, key)
        embedded = embed_actions(model.config, unwrap_single_action(model.config, actions), 1, model.dtype)
        state = model.rssm.predict(state, embedded, uniforms, kernels)
        features = state.features
        return (state, features, write(dream, features, index + 1, 0)), (actions, product)

    action_key, latent_key, last_key = split_key(key, 3)
    uniforms = model.rssm.sampling_uniforms(latent_key, horizon, len(first))
    steps = (jnp.arange(horizon), step_keys(action_key, horizon), uniforms)
    (_, last, dream), acted = jax.lax.scan(step, (starts, first, dream), steps)
    # The action at the last state is sampled, though nothing follows it: the actor runs on all H + 1 states.
    actions, products = jax.tree.map(lambda xs, x: jnp.concatenate([xs, x[None]]), acted, act(last, last_key))
    return dream, actions, products


class Exploration(NamedTuple):
    """What ``explore="disagreement"`` adds to a batch.

    Attributes:
      errors: the explorer's loss [B, T − 1].
      spread: spread of its networks, [], the mean over the batch with 0 for an episode's first row.
      rows: share of the other rows, [].
      imagined: intrinsic rewards of arriving at imagined states 1 … H, [H, N].
      replayed: those of arriving at the batch's rows, [B, T]; 0 for an episode's first row.
    """

    errors: jax.Array
    spread: jax.Array
    rows: jax.Array
    imagined: jax.Array
    replayed: jax.Array


def exploration(
    model: LossModel,
    frozen: LossModel,
    latents: Latent,
    rows: TrainBatch,
    dream_features: jax.Array,
    actions: Mapping[str, jax.Array],
) -> Exploration:
    """Loss and intrinsic rewards of the explorer, which predicts z from the state before and the action.

    Args:
      model: whose explorer learns.
      frozen: the same without gradients.
      latents: posterior states [B, T, ...].
      rows: the batch.
      dream_features: imagined features [H + 1, N, F].
      actions: imagined actions by name, [H + 1, N, ...].
    """
    before = jnp.concatenate([latents.features[:, :-1], rows.previous_actions[:, 1:]], -1)
    same_episode = 1 - rows.is_first[:, 1:]
    errors = same_episode * model.explorer.errors(before, latents.flat_stoch[:, 1:])
    spread = jnp.mean(same_episode * frozen.explorer.spread(before))
    replayed = jnp.pad(same_episode * frozen.explorer.reward(before), ((0, 0), (1, 0)))
    embedded = embed_actions(model.config, unwrap_single_action(model.config, actions), 2, model.dtype)
    imagined = frozen.explorer.reward(jnp.concatenate([dream_features, embedded], -1)[:-1])
    return Exploration(errors, spread, jnp.mean(same_episode), imagined, replayed)


def reconstruction_loss(decoded: Mapping[str, jax.Array], obs: Mapping[str, jax.Array]) -> jax.Array:
    """Squared errors [B, T] summed over all entries of all observations: no ½, no mean over pixels.

    Vectors [B, T, n] are compared in symlog space, images [B, T, H, W, C] in the range from 0 to 1.
    """
    total = jnp.zeros(())
    for name, prediction in decoded.items():
        if prediction.ndim == 5:
            error = jnp.sum(jnp.square(prediction - unit_range(obs[name], jnp.float32)), (-3, -2, -1))
        else:
            error = symlog_squared_error(prediction, obs[name])
        total += error
    return total


def actor_loss(
    policy: Policy, actions: Mapping[str, jax.Array], advantages: jax.Array, entropy_scale: float
) -> jax.Array:
    """REINFORCE with an entropy bonus, ``−(A_t · log π(a_t) + η · H(π_t))`` [H, N] (``imag_loss``).

    Discrete and continuous actions alike: no gradient runs through actions or dynamics, and advantages come without
    one.

    Args:
      policy: distributions at steps 0 … H, [H + 1, N, ...]; the last is left out.
      actions: sampled actions at steps 0 … H, [H + 1, N, ...]; the last is left out.
      advantages: A of steps 0 … H − 1, scaled, [H, N].
      entropy_scale: η.
    """
    log_prob = sum((policy[name].log_prob(sg(actions[name])) for name in policy), jnp.zeros(()))
    return -(advantages * log_prob[:-1] + entropy_scale * entropy(policy)[:-1])


def critic_loss(logits: jax.Array, returns: jax.Array, slow_values: jax.Array, slow_scale: float) -> jax.Array:
    """Two-hot cross entropy [...] to the returns [...], plus that to the slow critic's values [...] (``slowreg``)."""
    return symexp_twohot_loss(logits, returns) + slow_scale * symexp_twohot_loss(logits, slow_values)


def replay_return(
    rewards: jax.Array,
    is_terminal: jax.Array,
    is_last: jax.Array,
    bootstrap: jax.Array,
    discount: float,
    lambda_: float,
) -> jax.Array:
    """λ-returns [B, T − 1] along replayed rows [B, T] (``repl_loss``).

    ``G_t = r_{t+1} + γ (1 − terminal_{t+1}) [(1 − λ_{t+1}) b_{t+1} + λ_{t+1} G_{t+1}]`` for t = 0 … T − 2, with b the
    imagined return that starts at a row, and λ_t = 0 where the row's episode ends at t.
    """
    live, trace = discount * (1 - is_terminal), lambda_ * (1 - is_last)
    return lambda_return(rewards.T[1:], live.T[1:], bootstrap.T[1:], trace.T[1:]).T


def update_return_range(
    return_range: Mapping[str, jax.Array], returns: jax.Array, rate: float
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Move the 5th and 95th percentile towards those of ``returns`` (``retnorm``).

    ``lo ← (1 − rate) lo + rate · Per(R, 5)``, likewise ``hi``; ``S = max(1, hi − lo)`` with the moved values.

    Args:
      return_range: ``{"lo": [], "hi": []}``.
      returns: R, of any shape.
      rate: from 0 to 1.

    Returns:
      The moved range and the advantage scale S, [].
    """
    percentiles = jnp.percentile(sg(returns), jnp.array([5.0, 95.0]))
    moved = {
        name: (1 - rate) * return_range[name] + rate * now for name, now in zip(("lo", "hi"), percentiles, strict=True)
    }
    return moved, jnp.maximum(1.0, moved["hi"] - moved["lo"])


def entropy(policy: Policy) -> jax.Array:
    """Entropy [...] of all actions together, in nats."""
    return sum((distribution.entropy() for distribution in policy.values()), jnp.zeros(()))


def loss_scales(config: DreamerV3Config) -> dict[str, float]:
    """Weight of each term in the total."""
    return {
        "reconstruction": config.reconstruction_scale,
        "reward": config.reward_scale,
        "continue": config.continue_scale,
        "dynamics": config.kl_scale * config.kl_balance,
        "representation": config.kl_scale * (1 - config.kl_balance),
        "actor": config.actor_scale,
        "critic": config.critic_scale,
        "replay_critic": config.replay_critic_scale,
        "disagreement": 1.0,
    }


def _assert_shapes(losses: Mapping[str, jax.Array], rows: tuple[int, int], imagined: tuple[int, int]) -> None:
    """Each term has its shape before its mean: a broadcast in the wrong place would leave a plausible scalar."""
    replayed = (rows[0], imagined[1] // rows[0] - 1)
    expected = {
        "actor": imagined,
        "critic": imagined,
        "replay_critic": replayed,
        "disagreement": (rows[0], rows[1] - 1),
    }
    shapes = {name: value.shape for name, value in losses.items()}
    assert shapes == {name: expected.get(name, rows) for name in losses}, shapes
    assert losses.keys() - {"disagreement"} == set(LOSS_TERMS[1:]), losses.keys()
