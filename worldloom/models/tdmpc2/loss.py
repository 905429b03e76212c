"""Losses of TD-MPC2, in the order of the reference's ``_update``.

Time runs first in here: a batch of B windows with T rows holds S = T − H latent rollouts of H steps per window,
stacked as [H, B, S, …]. T = H + 1 is the published update.

Windows may run over an episode's end: steps of a rollout beyond it are left out of every loss. Without that, the last
H rows of an episode would never be where a rollout starts: neither the encoder nor the Q networks would be trained
where episodes are about to end, and for an environment whose only signal is its termination that is everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from worldloom.errors import DataError
from worldloom.models.tdmpc2.config import TDMPC2Config
from worldloom.models.tdmpc2.networks import CategoricalSample, GaussianSample
from worldloom.ops.keys import split_key
from worldloom.ops.symlog_twohot import cross_entropy

if TYPE_CHECKING:
    from worldloom.models.tdmpc2.model import TDMPC2WorldModel

Metrics = dict[str, jax.Array]
sg = jax.lax.stop_gradient


class Rows(NamedTuple):
    """Windows of rows by the arrival rule: ``rewards[:, t]`` and ``terminated[:, t]`` belong to reaching row t.

    Attributes:
      obs: [B, T, *obs_shape].
      actions: [B, T, A], chosen at each row.
      rewards: [B, T].
      terminated: [B, T], 1 where the row is terminal.
      weights: [B, S, H] of the rollouts' steps in the means over a batch, which are 1 on average (the same for all
        steps that stay in the episode they started in, 0 for the others).
      task: [B, 1] integers that broadcast against rows, or None.
    """

    obs: jax.Array
    actions: jax.Array
    rewards: jax.Array
    terminated: jax.Array
    weights: jax.Array
    task: jax.Array | None


class Rollouts(NamedTuple):
    """Latent rollouts of the model's step, which the policy's step starts from.

    Attributes:
      zs: [H+1, B, S, L].
      weights: [H, B, S], as in :class:`Rows`.
    """

    zs: jax.Array
    weights: jax.Array


def model_loss(
    model: TDMPC2WorldModel, rows: Rows, key: jax.Array | None, *, remat: bool = False
) -> tuple[jax.Array, tuple[Metrics, Rollouts]]:
    """Consistency, reward, value and termination losses (TD-MPC2, equation 3).

    Args:
      model, rows, key: as elsewhere.
      remat: keep no activations of networks for the backward pass; compute them again there.

    Returns:
      total: weighted sum, a scalar.
      terms: each loss before its weight; for episodic configs also what :func:`with_f1` reads.
      rollouts: for the policy.
    """
    c, task = model.config, rows.task
    forget = jax.checkpoint if remat else lambda network: network
    next_key, encode_key, prior_key, pair_key, dropout_key = split_key(key, 5)
    starts = rows.rewards.shape[1] - c.horizon
    actions, rewards = _unfold(rows.actions[:, :-1], c.horizon), _unfold(rows.rewards[:, 1:], c.horizon)
    terminated = _unfold(rows.terminated[:, 1:], c.horizon)
    weights = jnp.moveaxis(rows.weights, -1, 0)

    # Next latents and TD targets, from the observations themselves and without gradient. No entropy bonus. The prior's
    # value is one sample's for continuous actions and the exact expectation for discrete ones. There the regret of the
    # action taken comes off (advantage learning: Baird 1999; Bellemare et al. 2016), which leaves the best action's
    # value as it is and widens the gap below it 1 / (1 − α) times, out of the noise of the networks.
    next_z = sg(model.latent(rows.obs[:, 1:], task, next_key))
    pair = model.q_pair(pair_key)
    target_q = lambda z: lambda action: model.q_values(z, action, task, pair, target=True).min(0)  # noqa: E731
    next_q = model.prior(next_z, task, prior_key).expect(target_q(next_z))
    continues = model.gamma(task) * (1.0 - rows.terminated[:, 1:])
    target = rows.rewards[:, 1:] + continues * next_q
    if c.advantage_weight:
        z = jnp.concatenate([sg(model.latent(rows.obs[:, :1], task, encode_key)), next_z[:, :-1]], axis=1)
        prior = model.prior(z, task)
        assert isinstance(prior, CategoricalSample)
        target -= c.advantage_weight * prior.regret(target_q(z), rows.actions[:, :-1])
    td_target = _unfold(sg(target), c.horizon)

    # Latent rollout, through which the gradient flows.
    zs = [forget(model.latent)(rows.obs[:, :starts], task, encode_key)]
    for action in actions:
        zs.append(forget(model.next_latent)(zs[-1], action, task))
    z, z_after = jnp.stack(zs[:-1]), jnp.stack(zs[1:])

    # Losses. ρ discounts the steps of the rollout; the sum is divided by H, not by Σρᵗ.
    consistency = jnp.square(z_after - _unfold(next_z, c.horizon)).mean(-1)
    reward = cross_entropy(forget(model.reward_logits)(z, actions, task), model.two_hot(rewards))
    q_logits = forget(model.q_logits)(z, actions, task, dropout_key)
    value = cross_entropy(q_logits, model.two_hot(td_target)).mean(0)
    terms = {
        "consistency": _over_steps(consistency, weights, c.rho),
        "reward": _over_steps(reward, weights, c.rho),
        "value": _over_steps(value, weights, c.rho),
        "termination": jnp.zeros(()),
    }
    if c.episodic:
        logits = model.termination_logits(z_after)
        terms["termination"] = _over_steps(optax.sigmoid_binary_cross_entropy(logits, terminated), weights, rho=1.0)
        terms |= _termination_scores(logits[-1] > 0, terminated[-1] > 0, weights[-1] > 0)
    total = (
        c.consistency_coef * terms["consistency"]
        + c.reward_coef * terms["reward"]
        + c.value_coef * terms["value"]
        + c.termination_coef * terms["termination"]
    )
    return total, (terms, Rollouts(jnp.stack(zs), weights))


def policy_loss(
    model: TDMPC2WorldModel,
    rollouts: Rollouts,
    task: jax.Array | None,
    key: jax.Array | None,
    *,
    scale: jax.Array | None = None,
    remat: bool = False,
) -> tuple[jax.Array, Metrics]:
    """Maximise value plus entropy along the rollouts (TD-MPC2, equation 5); see the samples' ``objective``.

    Args:
      model: with the Q networks that the model's step left behind.
      rollouts: from before that step; no gradient reaches them.
      task: as in :class:`Rows`.
      key: of actions, the Q pair and its dropout, which is on here.
      scale: of the values, [], if it is not to follow from these rollouts.
      remat: as in :func:`model_loss`.

    Returns:
      loss: −mean_t ρᵗ · objective(q / scale, β), a scalar.
      metrics: ``pi_entropy``, ``pi_scaled_entropy`` and the new ``pi_scale``.
    """
    c, (zs, weights) = model.config, sg(rollouts)
    sample, values = _prior_values(model, zs, task, key, remat=remat)
    if scale is None:
        # The newest width enters the running scale first; then the scale is used.
        scale = move_scale(model.scale.value[...], sg(sample.average(values)[0]), c.tau)

    # A latent counts where the step that led to it does; the first one where a step follows in its episode.
    weights = jnp.concatenate([weights[:1], weights])
    loss = -_over_steps(sample.objective(values / scale, c.entropy_coef), weights, c.rho)
    return loss, {
        "pi_entropy": sample.entropy.mean(),
        "pi_scaled_entropy": sample.scaled_entropy.mean(),
        "pi_scale": scale,
    }


def first_values(
    model: TDMPC2WorldModel, rollouts: Rollouts, task: jax.Array | None, key: jax.Array | None
) -> jax.Array:
    """Values [B, S] of the prior in the rollouts' first latents, from which :func:`move_scale` finds their width."""
    sample, values = _prior_values(model, rollouts.zs, task, key)
    return sample.average(values)[0]


def move_scale(scale: jax.Array, values: jax.Array, tau: float) -> jax.Array:
    """The running scale moved towards the 5th to 95th percentile of ``values``, at least 1 before the average."""
    low, high = jnp.percentile(values, jnp.array([5.0, 95.0]))
    return scale + tau * (jnp.maximum(high - low, 1.0) - scale)


def _prior_values(
    model: TDMPC2WorldModel, zs: jax.Array, task: jax.Array | None, key: jax.Array | None, *, remat: bool = False
) -> tuple[GaussianSample | CategoricalSample, jax.Array]:
    """A draw of the prior at each latent, and the values that its objective takes."""
    action_key, pair_key, dropout_key = split_key(key, 3)
    members = model.q_pair(pair_key)
    q_values = lambda action: model.q_values(zs, action, task, members, dropout_key).mean(0)  # noqa: E731
    sample = model.prior(zs, task, action_key)
    return sample, sample.evaluate(jax.checkpoint(q_values) if remat else q_values)


def read_rows(config: TDMPC2Config, batch: Mapping[str, Any]) -> Rows:
    """Rows of a public batch: actions as vectors, terminations from ``is_terminal`` or ``continues``.

    ``is_first`` marks rows that begin an episode within the window; without it every window is of one episode.

    Raises:
      DataError: a key is missing, a shape does not fit, or there are not more rows than ``horizon``.
    """
    missing = [name for name in ("obs", "actions", "rewards") if name not in batch]
    if missing or not ("is_terminal" in batch or "continues" in batch):
        raise DataError(
            f"A batch needs obs, actions, rewards and is_terminal (or continues); this one has {', '.join(batch)}."
        )
    rewards = jnp.asarray(batch["rewards"], jnp.float32)
    if rewards.ndim != 2 or rewards.shape[1] <= config.horizon:
        raise DataError(f"rewards has shape {rewards.shape}; [B, T] with T > horizon={config.horizon} is needed.")
    if "is_terminal" in batch:
        terminated = jnp.asarray(batch["is_terminal"]).astype(jnp.float32)
    else:
        terminated = 1.0 - jnp.asarray(batch["continues"]).astype(jnp.float32)
    actions = jnp.asarray(batch["actions"])
    if config.action_type == "discrete" and actions.ndim == 2:
        actions = jax.nn.one_hot(actions, config.action_dim)
    shapes = {
        "obs": (jnp.shape(batch["obs"]), (*rewards.shape, *config.obs_shape)),
        "actions": (actions.shape, (*rewards.shape, config.action_dim)),
        "is_terminal": (terminated.shape, rewards.shape),
    }
    for name, (given, needed) in shapes.items():
        if given != needed:
            raise DataError(f"{name} has shape {given}; {needed} is needed beside rewards of shape {rewards.shape}.")
    task = batch.get("task")
    if config.multitask and (task is None or jnp.shape(task) != rewards.shape[:1]):
        raise DataError(f"A multitask batch needs task, integers of shape {rewards.shape[:1]}.")
    column = jnp.asarray(task)[:, None] if config.multitask else None
    seam = jnp.asarray(batch.get("is_first", jnp.zeros(rewards.shape))).astype(jnp.float32)
    inside = jnp.cumprod(1.0 - _unfold(seam[:, 1:], config.horizon), axis=0)
    weights = inside / jnp.maximum(inside.mean((1, 2), keepdims=True), 1 / inside[0].size)
    weights = jnp.moveaxis(weights, 0, -1)
    return Rows(jnp.asarray(batch["obs"]), actions.astype(jnp.float32), rewards, terminated, weights, column)


def _unfold(x: jax.Array, horizon: int) -> jax.Array:
    """[B, T−1, …] → [H, B, S, …]: entry (h, b, s) is ``x[b, s + h]``."""
    starts = x.shape[1] + 1 - horizon
    return jnp.stack([x[:, h : h + starts] for h in range(horizon)])


def _over_steps(x: jax.Array, weights: jax.Array, rho: float) -> jax.Array:
    """Mean over steps of ρᵗ · (weighted mean over the batch): two times [steps, B, S] → scalar."""
    return jnp.mean(rho ** jnp.arange(x.shape[0]) * jnp.mean(x * weights, (1, 2)))


def _termination_scores(predicted: jax.Array, terminated: jax.Array, weights: jax.Array) -> Metrics:
    """Shares of steps that terminate, are predicted to, and both; [B, S] booleans and weights of the last step."""
    events = {"rate": terminated, "predicted": predicted, "hits": predicted & terminated}
    return {f"termination_{name}": jnp.mean(weights * event) for name, event in events.items()}


def with_f1(terms: Metrics) -> Metrics:
    """``terms`` of a whole batch with the F1 score of predicted terminations in place of the shares it is made of."""
    if "termination_hits" not in terms:
        return terms
    terms = dict(terms)
    hits, predicted = terms.pop("termination_hits"), terms.pop("termination_predicted")
    recall, precision = hits / (terms["termination_rate"] + 1e-9), hits / (predicted + 1e-9)
    return terms | {"termination_f1": 2.0 * recall * precision / (recall + precision + 1e-9)}
