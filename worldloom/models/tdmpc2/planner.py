"""Planning in latent space: model predictive path integral control (MPPI) with a policy prior.

For continuous actions this is the planner of the TD-MPC2 reference. Discrete actions are not in the reference; here
the same loop is the cross-entropy method over one categorical per step (Rubinstein 1999): candidates are one-hot and
the elites' weighted mean of one-hots *is* the next categorical, so scoring and refitting are shared. Candidates are
drawn with probability ∝ mean + std: the spread that a Gaussian has of its own keeps the categorical from collapsing,
and ``max_std`` and ``min_std`` bound it in the same way. One discrete action often changes the value behind H steps by
less than the model errs in H steps, so there a candidate's value is the λ-mixture of its estimates of all lengths (as
TD(λ), in the spirit of the value expansions of Buckman et al. 2018), the shortest of which asks no model at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from worldloom.models.base import compiled
from worldloom.models.tdmpc2.config import TDMPC2Config
from worldloom.models.tdmpc2.networks import Transition
from worldloom.ops.keys import split_key, step_keys

if TYPE_CHECKING:
    from worldloom.models.tdmpc2.model import TDMPC2WorldModel


class Outcome(NamedTuple):
    """Where N action sequences lead: H actions and, before each of them and behind the last, H + 1 points.

    Attributes:
      actions: H times [N, A].
      rewards: H + 1 times [N], discounted sum of the rewards predicted up to there.
      discounts: H + 1 times [N], γᵗ, or 0 where the episode is predicted to have ended.
      zs: H + 1 times [N, L].
    """

    actions: tuple[jax.Array, ...]
    rewards: tuple[jax.Array, ...]
    discounts: tuple[jax.Array, ...]
    zs: tuple[jax.Array, ...]


@compiled
def plan(
    model: TDMPC2WorldModel,
    z: jax.Array,
    previous_mean: jax.Array,
    key: jax.Array | None,
    *,
    noise: jax.Array | None = None,
    task: jax.Array | None = None,
    explore: bool | jax.Array = False,
) -> tuple[jax.Array, jax.Array]:
    """Plan from each latent; one compiled call, whatever the number of environments.

    Args:
      model: the world model; sizes and temperatures come from its config.
      z: [L], or [B, L] for B environments, each with a plan of its own.
      previous_mean: [H, A] or [B, H, A] mean that the last call returned; zeros at the first step of an episode.
      key: of prior, candidates, Q pairs, the executed elite and exploration. None: candidates from a fixed key, the
        mode of all other draws, the heaviest elite, no exploration.
      noise: [iterations, H, num_samples − num_pi_trajs, A] (behind a batch axis if ``z`` has one) in place of the
        candidates' standard normal draws, or Gumbel draws for discrete actions.
      task: [] or [B] for multitask models.
      explore: add exploration noise to the action, as when collecting data.

    Returns:
      action: [A] or [B, A], clipped to [−1, 1]; one-hot if discrete.
      mean: [H, A] or [B, H, A] mean of the last iteration, not shifted.
    """
    pair_key, plan_key = split_key(key, 2)
    # One pair of Q networks per iteration, common to the environments: their weights are gathered once.
    iterations = model.config.planner_iterations
    pairs = jax.vmap(model.q_pair, axis_size=iterations)(step_keys(pair_key, iterations))

    def plan_one(z, previous_mean, key, noise, task):  # type: ignore[no-untyped-def]
        return _plan(model, z, previous_mean, pairs, key, noise, task, explore)

    if z.ndim == 1:
        return plan_one(z, previous_mean, plan_key, noise, task)
    keys = step_keys(plan_key, z.shape[0])
    return jax.vmap(plan_one)(z, previous_mean, keys, noise, task)


@compiled
def score(
    model: TDMPC2WorldModel,
    z: jax.Array,
    actions: jax.Array,
    key: jax.Array | None = None,
    *,
    task: jax.Array | None = None,
) -> jax.Array:
    """Values of action sequences: Σ_t γᵗ·r̂(z_t, a_t) + γᴴ·Q(z_H, a~π(z_H)), the mean of two Q networks.

    With λ < 1 (``value_lambda``) that counts λᴴ, and for h < H the estimate that ends in γʰ·Q(z_h, a_h) counts
    (1 − λ)·λʰ.
    Where the config is ``episodic``, nothing counts behind a latent whose termination is more likely than not.

    Args:
      model: the world model.
      z: [L] the latent that all sequences start from.
      actions: [H, N, A].
      key: of the last action and the pair of Q networks; None is the prior's mode and the first two.
      task: [] for multitask models.

    Returns:
      [N] values in the units of the data.
    """
    pair_key, action_key = split_key(key, 2)
    outcome = _rollout(model, model.transition(task), z, lambda t, z: actions[t], task)
    return _value(model, outcome, model.q_pair(pair_key), action_key, task)


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
      num_elites: E, candidates that count.
      temperature: of the weights; multiplies the values.
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
    # Actions would lose digits where a GPU or TPU multiplies matrices, which it does by TF32 or bfloat16 unasked.
    weighted = functools.partial(jnp.einsum, "e,hea->ha", weights, precision=jax.lax.Precision.HIGHEST)
    mean = weighted(chosen)
    variance = weighted(jnp.square(chosen - mean[:, None]))
    return mean, jnp.clip(jnp.sqrt(variance), min_std, max_std), elites, weights


def _plan(
    model: TDMPC2WorldModel,
    z: jax.Array,
    previous_mean: jax.Array,
    pairs: jax.Array,
    key: jax.Array | None,
    noise: jax.Array | None,
    task: jax.Array | None,
    explore: bool | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One environment's plan; ``pairs`` [iterations, 2] are the Q networks of each iteration."""
    c = model.config
    prior_key, noise_key, value_key, choice_key, explore_key = split_key(key, 5)
    transition = model.transition(task)
    mask = model.action_mask(task)

    # Trajectories of the prior compete in every iteration; all but their last value is computed once.
    prior_outcome = _policy_rollout(model, transition, z, prior_key, task)

    # The mean is warm-started, one step on; the spread is not.
    mean = jnp.concatenate([previous_mean[1:], jnp.zeros_like(previous_mean[:1])]) * mask
    std = jnp.full_like(mean, c.max_std) * mask
    if noise is None:
        shape = (c.planner_iterations, c.horizon, c.num_samples - c.num_pi_trajs, c.action_dim)
        noise = _noise(c, jax.random.key(0) if noise_key is None else noise_key, shape)
    value_keys = step_keys(value_key, c.planner_iterations)

    def refine(distribution, draws):  # type: ignore[no-untyped-def]
        noise, pair, key = draws
        mean, std = distribution
        candidates = _perturb(c, mean[:, None], std[:, None], noise)
        outcome = _rollout(model, transition, z, lambda t, z: candidates[t], task)
        outcome = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), prior_outcome, outcome)
        candidates = jnp.stack(outcome.actions)
        mean, std, elites, weights = refit(
            candidates,
            _value(model, outcome, pair, key, task),
            num_elites=c.num_elites,
            temperature=c.temperature,
            min_std=c.min_std,
            max_std=c.max_std,
        )
        return (mean * mask, std * mask), (candidates[0, elites], weights)

    (mean, std), (first_actions, weights) = jax.lax.scan(refine, (mean, std), (noise, pairs, value_keys))

    # An elite's first action is executed, not the mean.
    chosen = 0 if choice_key is None else jax.random.categorical(choice_key, jnp.log(weights[-1]))
    action = first_actions[-1, chosen]
    if explore_key is not None:
        noisy = _perturb(c, action, std[0], _noise(c, explore_key, action.shape))
        action = jnp.where(explore, noisy, action)
    return jnp.clip(action, -1.0, 1.0), mean


def _rollout(
    model: TDMPC2WorldModel,
    transition: Transition,
    z: jax.Array,
    choose: Callable[[int, jax.Array], jax.Array],
    task: jax.Array | None,
) -> Outcome:
    """Imagine H steps from ``z`` ([L] if common to all); ``choose(t, z)`` gives actions [N, A]."""
    gamma = model.gamma(task)
    actions = [choose(0, z)]
    lead = actions[0].shape[:-1]
    rewards, discounts = [jnp.zeros(lead)], [jnp.ones(lead)]
    zs = [jnp.broadcast_to(z, (*lead, z.shape[-1]))]
    for t in range(model.config.horizon):
        if t:
            actions.append(choose(t, z))
        z, reward_logits = transition(z, actions[t])
        rewards.append(rewards[t] + discounts[t] * model.decode_scalar(reward_logits))
        discounts.append(discounts[t] * gamma)
        if model.config.episodic:
            discounts[-1] = jnp.where(model.termination_logits(z) > 0.0, 0.0, discounts[-1])
        zs.append(z)
    return Outcome(tuple(actions), tuple(rewards), tuple(discounts), tuple(zs))


def _policy_rollout(
    model: TDMPC2WorldModel, transition: Transition, z: jax.Array, key: jax.Array | None, task: jax.Array | None
) -> Outcome:
    """``num_pi_trajs`` trajectories of the prior from ``z`` [L]."""
    keys = split_key(key, model.config.horizon)
    z = jnp.broadcast_to(z, (model.config.num_pi_trajs, *z.shape))
    return _rollout(model, transition, z, lambda t, z: model.prior(z, task, keys[t]).action, task)


def _value(
    model: TDMPC2WorldModel, outcome: Outcome, pair: jax.Array, key: jax.Array | None, task: jax.Array | None
) -> jax.Array:
    """[N] rewards plus the discounted value of the last latents under the prior, mixed with shorter estimates."""
    c = model.config
    q = lambda z: lambda action: model.q_values(z, action, task, pair).mean(0)  # noqa: E731
    *zs, last = outcome.zs
    *rewards, all_rewards = outcome.rewards
    *discounts, discount = outcome.discounts
    value = all_rewards + discount * model.prior(last, task, key).expect(q(last))
    if c.value_lambda < 1.0:
        for z, action, reward, discount in reversed(list(zip(zs, outcome.actions, rewards, discounts, strict=True))):
            value = (1.0 - c.value_lambda) * (reward + discount * q(z)(action)) + c.value_lambda * value
    return value


def _noise(config: TDMPC2Config, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    draw = jax.random.gumbel if config.action_type == "discrete" else jax.random.normal
    return draw(key, shape, jnp.float32)


def _perturb(config: TDMPC2Config, mean: jax.Array, std: jax.Array, noise: jax.Array) -> jax.Array:
    """Actions around ``mean``: Gaussian and clipped, or one-hot with probability ∝ mean + std (Gumbel-max)."""
    if config.action_type == "continuous":
        return jnp.clip(mean + std * noise, -1.0, 1.0)
    return jax.nn.one_hot(jnp.argmax(jnp.log(mean + std) + noise, axis=-1), config.action_dim)
