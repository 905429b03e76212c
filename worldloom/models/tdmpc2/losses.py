"""Losses of TD-MPC2, in the order of the reference's ``TDMPC2._update``.

Time runs first in here: a batch of B windows with T rows holds S = T − H latent rollouts of H steps per window,
stacked as [H, B, S, …]. T = H + 1 is the published update.

Windows may run over an episode's end: steps of a rollout beyond it have weight 0 in every loss. If windows ended with
their episode, no rollout would start in an episode's last H rows: neither the encoder nor the Q networks would be
trained there, and for an environment whose only signal is its termination nothing would be learned.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from worldloom.models.base import check_new_term
from worldloom.models.tdmpc2.batch import TrainBatch, cut, unfold
from worldloom.models.tdmpc2.config import TDMPC2Config
from worldloom.models.tdmpc2.networks import CategoricalSample, GaussianSample, ValueScale
from worldloom.ops.keys import split_key
from worldloom.ops.symlog_twohot import cross_entropy

LOSS_TERMS = ("loss", "consistency", "reward", "value", "termination", "policy")
"""Names of the losses in metrics; ``loss`` is the model's total, which does not include ``policy``."""

Metrics = dict[str, jax.Array]
sg = jax.lax.stop_gradient


class LossModel(Protocol):
    """What the losses use of a world model.

    Latents ``z`` are [..., L], actions [..., A]; ``task`` broadcasts against their batch axes, None for one task.
    Without a ``key`` every draw takes its mode.
    """

    config: TDMPC2Config
    scale: ValueScale

    def latent(self, obs: Any, task: jax.Array | None, key: jax.Array | None = None) -> jax.Array:
        """Encode: [..., *obs_shape], or a dict of such arrays, → [..., L]."""

    def next_latent(self, z: jax.Array, action: jax.Array, task: jax.Array | None) -> jax.Array:
        """Dynamics: [..., L]."""

    def reward_logits(self, z: jax.Array, action: jax.Array, task: jax.Array | None) -> jax.Array:
        """[..., K]."""

    def termination_logits(self, z: jax.Array) -> jax.Array:
        """[...] of ``z`` being terminal; called for ``episodic`` configs only."""

    def prior(
        self, z: jax.Array, task: jax.Array | None, key: jax.Array | None = None
    ) -> GaussianSample | CategoricalSample:
        """Sample of the policy prior."""

    def q_pair(self, key: jax.Array | None) -> jax.Array:
        """Indices [2] of two different Q networks."""

    def q_logits(
        self, z: jax.Array, action: jax.Array, task: jax.Array | None, key: jax.Array | None = None
    ) -> jax.Array:
        """[N, ..., K] of all Q networks; a key turns dropout on."""

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
        """[n, ...] of the Q networks ``members`` [n] or their targets, in the units of the data."""

    def gamma(self, task: jax.Array | None) -> jax.Array:
        """Discount, [] or with the axes of ``task``."""

    def explorer_loss(
        self, z: jax.Array, action: jax.Array, task: jax.Array | None, next_z: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Errors [...] of the explorer's predictions of ``next_z``, and their spread [...]; with ``explore`` only."""

    def intrinsic_reward(self, z: jax.Array, action: jax.Array, task: jax.Array | None) -> jax.Array:
        """Intrinsic reward [...] for ``action`` at ``z``; with ``explore`` only."""

    def two_hot(self, x: jax.Array) -> jax.Array:
        """Rewards or values [...] → target weights [..., K]."""


class Rollouts(NamedTuple):
    """Latent rollouts of the model's loss, on which the policy is trained.

    Attributes:
      zs: [H+1, B, S, L].
      weights: [H, B, S], as in :class:`TrainBatch` but time first.
    """

    zs: jax.Array
    weights: jax.Array


class ModelLoss(NamedTuple):
    """Loss of everything but the policy.

    Attributes:
      total: weighted sum of the terms, a scalar.
      terms: ``consistency reward value termination`` before their weights, scalars; for episodic configs also the
        shares of terminations that :func:`with_f1` reads.
      rollouts: input of :func:`policy_loss`.
    """

    total: jax.Array
    terms: Metrics
    rollouts: Rollouts

    def add_term(self, name: str, elements: jax.Array, scale: float = 1.0) -> ModelLoss:
        """With a further term: the mean of ``elements`` [...] under ``name``, ``scale`` times that in the total.

        For a subclass that overrides ``model_loss``; it lists the name in its ``loss_terms``.
        """
        check_new_term(name, self.terms)
        term = jnp.mean(elements)
        return self._replace(total=self.total + scale * term, terms=self.terms | {name: term})


class PolicyLoss(NamedTuple):
    """Loss of the policy prior.

    Attributes:
      loss: a scalar.
      metrics: scalars ``pi_entropy``, ``pi_scaled_entropy`` and the updated ``pi_scale``.
    """

    loss: jax.Array
    metrics: Metrics

    def add_term(self, name: str, elements: jax.Array, scale: float = 1.0) -> PolicyLoss:
        """With a further term: the mean of ``elements`` [...] under ``name``, ``scale`` times that in the loss.

        For a subclass that overrides ``policy_loss``; it lists the name in its ``loss_terms``.
        """
        check_new_term(name, self.metrics)
        term = jnp.mean(elements)
        return self._replace(loss=self.loss + scale * term, metrics=self.metrics | {name: term})


def model_loss(model: LossModel, batch: TrainBatch, key: jax.Array | None, *, remat: bool = False) -> ModelLoss:
    """Consistency, reward, value and termination losses (TD-MPC2, equation 3; reference: ``_update``).

    Args:
      model: with the weights before the update.
      batch: from :func:`worldloom.models.tdmpc2.batch.prepare_batch`.
      key: key of all draws; None takes their modes.
      remat: recompute the networks' activations in the backward pass instead of storing them.
    """
    c, task = model.config, batch.task
    maybe_remat = jax.checkpoint if remat else lambda network: network
    next_key, encode_key, prior_key, pair_key, dropout_key = split_key(key, 5)

    # Rollouts of the data: [H, B, S, …]. Rewards and terminations arrive one row after the action.
    actions, rewards = unfold(batch.actions[:, :-1], c.horizon), unfold(batch.rewards[:, 1:], c.horizon)
    terminated = unfold(batch.terminated[:, 1:], c.horizon)
    weights = jnp.moveaxis(batch.weights, -1, 0)

    # Targets: encoded next observations, and values bootstrapped from them.
    next_z = sg(model.latent(cut(batch.obs, slice(1, None)), task, next_key))
    td_targets = _td_targets(model, batch, next_z, encode_key=encode_key, prior_key=prior_key, pair_key=pair_key)
    next_z, td_targets = unfold(next_z, c.horizon), unfold(td_targets, c.horizon)

    # Latent rollout, which gradients flow through.
    starts = batch.rewards.shape[1] - c.horizon
    rollout = [maybe_remat(model.latent)(cut(batch.obs, slice(starts)), task, encode_key)]
    for action in actions:
        rollout.append(maybe_remat(model.next_latent)(rollout[-1], action, task))
    z, z_after = jnp.stack(rollout[:-1]), jnp.stack(rollout[1:])

    # Predictions.
    reward_logits = maybe_remat(model.reward_logits)(z, actions, task)
    q_logits = maybe_remat(model.q_logits)(z, actions, task, dropout_key)

    # Losses. ρᵗ weighs the steps of a rollout; the sum is divided by H, not by Σρᵗ.
    consistency = jnp.square(z_after - next_z).mean(-1)
    reward = cross_entropy(reward_logits, model.two_hot(rewards))
    value = cross_entropy(q_logits, model.two_hot(td_targets)).mean(0)
    terms = {
        "consistency": _mean_over_steps(consistency, weights, c.rho),
        "reward": _mean_over_steps(reward, weights, c.rho),
        "value": _mean_over_steps(value, weights, c.rho),
        "termination": jnp.zeros(()),
    }
    if c.episodic:
        logits = model.termination_logits(z_after)
        errors = optax.sigmoid_binary_cross_entropy(logits, terminated)
        terms["termination"] = _mean_over_steps(errors, weights, rho=1.0)
        terms |= _termination_shares(logits[-1] > 0, terminated[-1] > 0, weights[-1] > 0)
    exploring = jnp.zeros(())
    if c.explore == "disagreement":
        errors, spread = model.explorer_loss(z, actions, task, next_z)
        exploring = _mean_over_steps(errors, weights, rho=1.0)
        terms |= {"disagreement": exploring, "explore_spread": _mean_over_steps(spread, weights, rho=1.0)}
    total = (
        c.consistency_coef * terms["consistency"]
        + c.reward_coef * terms["reward"]
        + c.value_coef * terms["value"]
        + c.termination_coef * terms["termination"]
        + exploring
    )
    return ModelLoss(total, terms, Rollouts(jnp.stack(rollout), weights))


def policy_loss(
    model: LossModel,
    rollouts: Rollouts,
    task: jax.Array | None,
    key: jax.Array | None,
    *,
    scale: jax.Array | None = None,
    remat: bool = False,
) -> PolicyLoss:
    """−mean_t ρᵗ · objective(q / scale, β) along the rollouts (TD-MPC2, equation 5; reference: ``update_pi``).

    The objective is value plus β times entropy, see ``GaussianSample.objective`` and ``CategoricalSample.objective``.

    Args:
      model: with the Q networks that the model's step just updated.
      rollouts: from before that step; no gradient reaches them.
      task: as in :class:`TrainBatch`.
      key: key of actions, the Q pair and its dropout, which is on here.
      scale: fixed scale of the values, []; if None, the running scale updated with these rollouts.
      remat: as in :func:`model_loss`.
    """
    c, (zs, weights) = model.config, sg(rollouts)
    sample, values = _prior_values(model, zs, task, key, remat=remat)
    if scale is None:
        # As in the reference, the running scale is updated before it is used.
        scale = update_scale(model.scale.value[...], sg(sample.average(values)[0]), c.tau)

    # A latent has the weight of the step that led to it; the first latent has that of the step that follows it.
    weights = jnp.concatenate([weights[:1], weights])
    loss = -_mean_over_steps(sample.objective(values / scale, c.entropy_coef), weights, c.rho)
    return PolicyLoss(
        loss,
        {
            "pi_entropy": sample.entropy.mean(),
            "pi_scaled_entropy": sample.scaled_entropy.mean(),
            "pi_scale": scale,
        },
    )


def first_values(model: LossModel, rollouts: Rollouts, task: jax.Array | None, key: jax.Array | None) -> jax.Array:
    """Values [B, S] of the prior in the rollouts' first latents, the input of :func:`update_scale`."""
    sample, values = _prior_values(model, rollouts.zs, task, key)
    return sample.average(values)[0]


def update_scale(scale: jax.Array, values: jax.Array, tau: float) -> jax.Array:
    """Move the running scale [] towards the width of ``values`` (reference: ``RunningScale.update``).

    The width is that between the 5th and 95th percentiles, at least 1: the bound applies before the average.
    """
    low, high = jnp.percentile(values, jnp.array([5.0, 95.0]))
    return scale + tau * (jnp.maximum(high - low, 1.0) - scale)


def with_f1(terms: Metrics) -> Metrics:
    """Replace the shares of terminations in ``terms`` by their rate and F1 (reference: ``termination_statistics``).

    F1 is no mean over rows: ``terms`` must be those of the whole batch, averaged over its microbatches.
    """
    if "termination_hits" not in terms:
        return terms
    terms = dict(terms)
    hits, predicted = terms.pop("termination_hits"), terms.pop("termination_predicted")
    recall, precision = hits / (terms["termination_rate"] + 1e-9), hits / (predicted + 1e-9)
    return terms | {"termination_f1": 2.0 * recall * precision / (recall + precision + 1e-9)}


def _td_targets(
    model: LossModel,
    batch: TrainBatch,
    next_z: jax.Array,
    *,
    encode_key: jax.Array | None,
    prior_key: jax.Array | None,
    pair_key: jax.Array | None,
) -> jax.Array:
    """r + γ · (1 − terminated) · E_π[min of two target Qs at z'], without gradient (reference: ``_td_target``).

    No entropy bonus. The expectation is one sample for continuous actions and exact for discrete ones. For discrete
    actions α times the regret of the action taken is subtracted (advantage learning: Baird 1999; Bellemare et al.
    2016). That leaves the value of the best action unchanged and widens the gap below it 1 / (1 − α) times, so that
    it exceeds the networks' noise.

    Args:
      model, batch: as in :func:`model_loss`.
      next_z: [B, T−1, L] encodings of ``obs[:, 1:]``.
      encode_key: key that the latent rollout encodes with.
      prior_key: key of the action at ``next_z``.
      pair_key: key of the two target Q networks.

    Returns:
      [B, T−1].
    """
    c, task = model.config, batch.task
    pair = model.q_pair(pair_key)
    target_q = lambda z: lambda action: model.q_values(z, action, task, pair, target=True).min(0)  # noqa: E731
    next_q = model.prior(next_z, task, prior_key).expect(target_q(next_z))
    discounts = model.gamma(task) * (1.0 - batch.terminated[:, 1:])
    targets = batch.rewards[:, 1:] + discounts * next_q
    if c.advantage_weight or c.explore == "disagreement":
        z = jnp.concatenate([sg(model.latent(cut(batch.obs, slice(1)), task, encode_key)), next_z[:, :-1]], axis=1)
    if c.explore == "disagreement":
        targets += model.intrinsic_reward(z, batch.actions[:, :-1], task)
    if c.advantage_weight:
        prior = model.prior(z, task)
        assert isinstance(prior, CategoricalSample)
        targets -= c.advantage_weight * prior.regret(target_q(z), batch.actions[:, :-1])
    return sg(targets)


def _prior_values(
    model: LossModel, zs: jax.Array, task: jax.Array | None, key: jax.Array | None, *, remat: bool = False
) -> tuple[GaussianSample | CategoricalSample, jax.Array]:
    """A sample of the prior at each latent, and the mean of two Q networks as its ``evaluate`` returns it."""
    action_key, pair_key, dropout_key = split_key(key, 3)
    members = model.q_pair(pair_key)
    q_values = lambda action: model.q_values(zs, action, task, members, dropout_key).mean(0)  # noqa: E731
    sample = model.prior(zs, task, action_key)
    return sample, sample.evaluate(jax.checkpoint(q_values) if remat else q_values)


def _mean_over_steps(x: jax.Array, weights: jax.Array, rho: float) -> jax.Array:
    """Mean over steps of ρᵗ · (weighted mean over the batch); both arrays are [steps, B, S]."""
    return jnp.mean(rho ** jnp.arange(x.shape[0]) * jnp.mean(x * weights, (1, 2)))


def _termination_shares(predicted: jax.Array, terminated: jax.Array, weights: jax.Array) -> Metrics:
    """Shares of steps that terminate, are predicted to, and both; [B, S] booleans and weights of the last step."""
    events = {"rate": terminated, "predicted": predicted, "hits": predicted & terminated}
    return {f"termination_{name}": jnp.mean(weights * event) for name, event in events.items()}
