"""Planning in latent space: model predictive path integral control (MPPI) with a policy prior.

For continuous actions this is the planner of the TD-MPC2 reference (``TDMPC2._plan``, ``_estimate_value``): candidate
action sequences are rolled out and scored by the model, and the sampling distribution is refitted to the best of them,
several times.

Discrete actions are not in the reference; here the same loop is the cross-entropy method over one categorical per step
(Rubinstein 1999). Candidates are one-hot and the elites' weighted mean of one-hots *is* the next categorical, so that
scoring and refitting are shared. Two things differ:

- Candidates are drawn with probability ∝ mean + std. A Gaussian keeps its spread in std; adding it to the categorical's
  mean keeps that from collapsing, and ``max_std`` and ``min_std`` bound it in the same way.
- A candidate's value is the λ-mixture of its estimates of all lengths (as in TD(λ), in the spirit of the value
  expansions of Buckman et al. 2018). One discrete action often changes the value after H steps by less than the model
  errs in H steps; the shortest estimate uses no model prediction at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from worldloom.models.base import compiled
from worldloom.models.tdmpc2.config import TDMPC2Config
from worldloom.models.tdmpc2.networks import CategoricalSample, GaussianSample
from worldloom.ops.keys import split_key, step_keys

DynamicsReward = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""z [N, L], or [L] if shared, and action [N, A] → next latent [N, L] and reward logits [N, K]."""


class PlannerModel(Protocol):
    """What the planner uses of a world model. ``task`` is [], or None for a single-task model.

    Called outside of ``jit``, :func:`plan` and :func:`score` need a :class:`worldloom.models.base.WorldModel`.
    """

    config: TDMPC2Config

    def fused_dynamics_reward(self, task: jax.Array | None) -> DynamicsReward:
        """Dynamics and reward of one task as a function of latents and actions."""

    def termination_logits(self, z: jax.Array) -> jax.Array:
        """[N, L] → [N] of being terminal; called for ``episodic`` configs only."""

    def prior(
        self, z: jax.Array, task: jax.Array | None, key: jax.Array | None = None
    ) -> GaussianSample | CategoricalSample:
        """Sample of the policy prior at ``z`` [N, L]; the mode without a key."""

    def q_pair(self, key: jax.Array | None) -> jax.Array:
        """Indices [2] of two different Q networks."""

    def q_values(self, z: jax.Array, action: jax.Array, task: jax.Array | None, members: jax.Array) -> jax.Array:
        """[N, L] and [N, A] → [n, N], values of the Q networks ``members`` [n] in the units of the data."""

    def decode_scalar(self, logits: jax.Array) -> jax.Array:
        """Reward logits [N, K] → [N] in the units of the data."""

    def gamma(self, task: jax.Array | None) -> jax.Array:
        """Discount of the task, []."""

    def action_mask(self, task: jax.Array | None) -> jax.Array:
        """[A], 1 for dimensions that the task has, 0 for others."""


class Candidates(NamedTuple):
    """N action sequences and what the model predicts for them at H + 1 points: before each action and after the last.

    Attributes:
      actions: H times [N, A].
      rewards: H + 1 times [N], discounted sum of the rewards predicted up to the point.
      discounts: H + 1 times [N], γᵗ, or 0 where the episode is predicted to have ended.
      zs: H + 1 times [N, L].
    """

    actions: tuple[jax.Array, ...]
    rewards: tuple[jax.Array, ...]
    discounts: tuple[jax.Array, ...]
    zs: tuple[jax.Array, ...]


@compiled
def plan(
    model: PlannerModel,
    z: jax.Array,
    previous_mean: jax.Array,
    key: jax.Array | None,
    *,
    noise: jax.Array | None = None,
    task: jax.Array | None = None,
    explore: bool | jax.Array = False,
) -> tuple[jax.Array, jax.Array]:
    """Plan from each latent; one compiled call for any number of environments (reference: ``_plan``).

    Args:
      model: the world model; sizes and temperatures come from its config.
      z: [L], or [B, L] for B environments, each with a plan of its own.
      previous_mean: [H, A] or [B, H, A] mean that the last call returned; zeros at the first step of an episode.
      key: key of prior, candidates, Q pairs, the executed elite and exploration. None: candidates from a fixed key,
        the mode of all other draws, the heaviest elite, no exploration.
      noise: [iterations, H, num_samples − num_pi_trajs, A] (after a batch axis if ``z`` has one) in place of the
        candidates' standard normal draws, or Gumbel draws for discrete actions.
      task: [] or [B] for multitask models.
      explore: add exploration noise to the action, as when collecting data.

    Returns:
      action: [A] or [B, A], clipped to [−1, 1]; one-hot if discrete.
      mean: [H, A] or [B, H, A] mean of the last iteration, not shifted.
    """
    pair_key, plan_key = split_key(key, 2)
    # One pair of Q networks per iteration, shared by all environments: their weights are then gathered once.
    iterations = model.config.planner_iterations
    q_pairs = jax.vmap(model.q_pair, axis_size=iterations)(step_keys(pair_key, iterations))

    def plan_one(z, previous_mean, key, noise, task):  # type: ignore[no-untyped-def]
        return _plan_one(model, z, previous_mean, q_pairs, key, noise, task, explore)

    if z.ndim == 1:
        return plan_one(z, previous_mean, plan_key, noise, task)
    keys = step_keys(plan_key, z.shape[0])
    return jax.vmap(plan_one)(z, previous_mean, keys, noise, task)


@compiled
def score(
    model: PlannerModel,
    z: jax.Array,
    actions: jax.Array,
    key: jax.Array | None = None,
    *,
    task: jax.Array | None = None,
) -> jax.Array:
    """Values of action sequences: Σ_t γᵗ·r̂(z_t, a_t) + γᴴ·Q(z_H, a~π(z_H)) (reference: ``_estimate_value``).

    Q is the mean of two Q networks. With λ < 1 (``value_lambda``) this estimate has weight λᴴ, and for h < H the
    estimate that ends in γʰ·Q(z_h, a_h) has weight (1 − λ)·λʰ.
    Where the config is ``episodic``, nothing after a latent counts whose termination is more likely than not.

    Args:
      model: the world model.
      z: [L] the latent that all sequences start from.
      actions: [H, N, A].
      key: key of the last action and the pair of Q networks; None is the prior's mode and the first two.
      task: [] for multitask models.

    Returns:
      [N] values in the units of the data.
    """
    pair_key, action_key = split_key(key, 2)
    candidates = _rollout(model, model.fused_dynamics_reward(task), z, lambda t, z: actions[t], task)
    return _estimate_value(model, candidates, model.q_pair(pair_key), action_key, task)


def refit(
    actions: jax.Array,
    values: jax.Array,
    *,
    num_elites: int,
    temperature: float,
    min_std: float,
    max_std: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Fit the sampling distribution to the best candidates, weighted by exp(temperature · value).

    Args:
      actions: [H, N, A].
      values: [N]; NaN counts as 0 and infinities as the largest finite numbers.
      num_elites: E, number of best candidates to fit to.
      temperature: factor on the values in the weights.
      min_std: lower bound of the standard deviation.
      max_std: upper bound.

    Returns:
      mean: [H, A].
      std: [H, A] around that mean.
      elites: [E] indices, best first.
      weights: [E], sum 1.
    """
    best, elites = jax.lax.top_k(jnp.nan_to_num(values, nan=0.0), num_elites)
    weights = jax.nn.softmax(temperature * (best - best[0]))
    chosen = actions[:, elites]
    # By default GPUs and TPUs multiply matrices in TF32 or bfloat16, which would round the actions.
    weighted = functools.partial(jnp.einsum, "e,hea->ha", weights, precision=jax.lax.Precision.HIGHEST)
    mean = weighted(chosen)
    variance = weighted(jnp.square(chosen - mean[:, None]))
    return mean, jnp.clip(jnp.sqrt(variance), min_std, max_std), elites, weights


def _plan_one(
    model: PlannerModel,
    z: jax.Array,
    previous_mean: jax.Array,
    q_pairs: jax.Array,
    key: jax.Array | None,
    noise: jax.Array | None,
    task: jax.Array | None,
    explore: bool | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Plan of one environment; ``q_pairs`` [iterations, 2] are the Q networks of each iteration, the rest as above."""
    c = model.config
    prior_key, noise_key, value_key, choice_key, explore_key = split_key(key, 5)
    dynamics_reward = model.fused_dynamics_reward(task)
    mask = model.action_mask(task)

    # Candidates of the prior, [num_pi_trajs]: they compete in every iteration and are rolled out once.
    prior_candidates = _rollout_prior(model, dynamics_reward, z, prior_key, task)

    # Sampling distribution: the mean is warm-started, shifted by one step; the std is not.
    mean = jnp.concatenate([previous_mean[1:], jnp.zeros_like(previous_mean[:1])]) * mask
    std = jnp.full_like(mean, c.max_std) * mask
    if noise is None:
        shape = (c.planner_iterations, c.horizon, c.num_samples - c.num_pi_trajs, c.action_dim)
        noise = _draw_noise(c, jax.random.key(0) if noise_key is None else noise_key, shape)
    value_keys = step_keys(value_key, c.planner_iterations)

    # Refinement: sample, roll out, score, refit.
    def refine(distribution, draws):  # type: ignore[no-untyped-def]
        noise, q_pair, value_key = draws
        mean, std = distribution
        sampled = _perturb(c, mean[:, None], std[:, None], noise)
        sampled_candidates = _rollout(model, dynamics_reward, z, lambda t, z: sampled[t], task)
        candidates = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), prior_candidates, sampled_candidates)
        actions = jnp.stack(candidates.actions)
        mean, std, elites, weights = refit(
            actions,
            _estimate_value(model, candidates, q_pair, value_key, task),
            num_elites=c.num_elites,
            temperature=c.temperature,
            min_std=c.min_std,
            max_std=c.max_std,
        )
        return (mean * mask, std * mask), (actions[0, elites], weights)

    (mean, std), (first_actions, weights) = jax.lax.scan(refine, (mean, std), (noise, q_pairs, value_keys))

    # Action: the first one of an elite drawn by weight (not of the mean), with exploration noise if asked for.
    chosen = 0 if choice_key is None else jax.random.categorical(choice_key, jnp.log(weights[-1]))
    action = first_actions[-1, chosen]
    if explore_key is not None:
        noisy = _perturb(c, action, std[0], _draw_noise(c, explore_key, action.shape))
        action = jnp.where(explore, noisy, action)
    return jnp.clip(action, -1.0, 1.0), mean


def _rollout(
    model: PlannerModel,
    dynamics_reward: DynamicsReward,
    z: jax.Array,
    choose: Callable[[int, jax.Array], jax.Array],
    task: jax.Array | None,
) -> Candidates:
    """Roll out H steps from ``z``, [N, L] or [L] if shared; ``choose(t, z)`` gives the actions [N, A] of step t."""
    gamma = model.gamma(task)
    actions = [choose(0, z)]
    lead = actions[0].shape[:-1]
    rewards, discounts = [jnp.zeros(lead)], [jnp.ones(lead)]
    zs = [jnp.broadcast_to(z, (*lead, z.shape[-1]))]
    for t in range(model.config.horizon):
        if t:
            actions.append(choose(t, z))
        # The first step passes a shared `z` unbroadcast, which costs one row of the product instead of N.
        z, reward_logits = dynamics_reward(z, actions[t])
        rewards.append(rewards[t] + discounts[t] * model.decode_scalar(reward_logits))
        discounts.append(discounts[t] * gamma)
        if model.config.episodic:
            discounts[-1] = jnp.where(model.termination_logits(z) > 0.0, 0.0, discounts[-1])
        zs.append(z)
    return Candidates(tuple(actions), tuple(rewards), tuple(discounts), tuple(zs))


def _rollout_prior(
    model: PlannerModel, dynamics_reward: DynamicsReward, z: jax.Array, key: jax.Array | None, task: jax.Array | None
) -> Candidates:
    """``num_pi_trajs`` candidates from ``z`` [L] whose actions are samples of the prior."""
    keys = split_key(key, model.config.horizon)
    z = jnp.broadcast_to(z, (model.config.num_pi_trajs, *z.shape))
    return _rollout(model, dynamics_reward, z, lambda t, z: model.prior(z, task, keys[t]).action, task)


def _estimate_value(
    model: PlannerModel, candidates: Candidates, q_pair: jax.Array, key: jax.Array | None, task: jax.Array | None
) -> jax.Array:
    """Values [N] of :func:`score`; ``q_pair`` [2] are the Q networks, ``key`` is that of the last action."""
    c = model.config
    q = lambda z: lambda action: model.q_values(z, action, task, q_pair).mean(0)  # noqa: E731
    *zs, last_z = candidates.zs
    *rewards, last_reward = candidates.rewards
    *discounts, last_discount = candidates.discounts

    # The longest estimate: all rewards, then the prior's value at the last latent.
    value = last_reward + last_discount * model.prior(last_z, task, key).expect(q(last_z))
    if c.value_lambda < 1.0:
        # The λ-mixture from its end: V_h = (1 − λ)·(rewards up to h + γʰ·Q(z_h, a_h)) + λ·V_{h+1}.
        steps = list(zip(zs, candidates.actions, rewards, discounts, strict=True))
        for z, action, reward, discount in reversed(steps):
            value = (1.0 - c.value_lambda) * (reward + discount * q(z)(action)) + c.value_lambda * value
    return value


def _draw_noise(config: TDMPC2Config, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise of :func:`_perturb`: standard normal, or standard Gumbel for discrete actions."""
    draw = jax.random.gumbel if config.action_type == "discrete" else jax.random.normal
    return draw(key, shape, jnp.float32)


def _perturb(config: TDMPC2Config, mean: jax.Array, std: jax.Array, noise: jax.Array) -> jax.Array:
    """Actions around ``mean``: Gaussian and clipped, or one-hot with probability ∝ mean + std (Gumbel-max)."""
    if config.action_type == "continuous":
        return jnp.clip(mean + std * noise, -1.0, 1.0)
    return jax.nn.one_hot(jnp.argmax(jnp.log(mean + std) + noise, axis=-1), config.action_dim)
