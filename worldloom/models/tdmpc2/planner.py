"""Planning in latent space: model predictive path integral control (MPPI) with a policy prior.

For continuous actions this is the planner of the TD-MPC2 reference (``TDMPC2._plan``, ``_estimate_value``): candidate
action sequences are rolled out and scored by the model, and the sampling distribution is refitted to the best of them,
several times.

Discrete actions are not in the reference; here the same loop is the cross-entropy method over one categorical per step
(Rubinstein 1999). Candidates are one-hot and the elites' weighted mean of one-hots *is* the next categorical, so that
scoring and refitting are shared. Two things differ:

- Candidates are drawn with probability ∝ mean + std. A Gaussian keeps its spread in std; adding it to the categorical's
  mean keeps that from collapsing, and ``max_std`` and ``min_std`` bound it in the same way (``least_std``).
- A candidate's value is the λ-mixture of its estimates of all lengths (as in TD(λ), in the spirit of the value
  expansions of Buckman et al. 2018). One discrete action often changes the value after H steps by less than the model
  errs in H steps; the shortest estimate uses no model prediction at all.

The loop itself is :func:`worldloom.planning.mppi`, which knows no networks; here are TD-MPC2's callables for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from worldloom import planning
from worldloom.errors import DataError
from worldloom.models.base import WorldModel, compiled
from worldloom.models.tdmpc2.config import TDMPC2Config
from worldloom.models.tdmpc2.latent import LatentState
from worldloom.models.tdmpc2.networks import CategoricalSample, GaussianSample
from worldloom.ops.keys import split_key, step_keys
from worldloom.planning import Candidates, Estimate, Step, Transition, Value

F = TypeVar("F", bound=Callable[..., Any])

DynamicsReward = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""z [N, L], or [L] if shared, and action [N, A] → next latent [N, L] and reward logits [N, K]."""


class PlannerModel(Protocol):
    """What the planner uses of a world model. ``task`` is [], or None for a single-task model.

    Any object with these methods will do. Outside of a trace, :func:`plan` and :func:`score` are compiled once for the
    :class:`worldloom.WorldModel` s of a config. For another object they are compiled at every call, because nothing
    says which of its attributes are weights that change; ``jax.jit(functools.partial(plan, model))`` is compiled once,
    with the weights of that moment.
    """

    config: TDMPC2Config

    def fused_dynamics_reward(self, task: jax.Array | None) -> DynamicsReward:
        """Dynamics and reward of one task as a function of latents and actions."""

    def intrinsic_reward(self, z: jax.Array, action: jax.Array, task: jax.Array | None) -> jax.Array:
        """[N, L] and [N, A] → [N]; called with ``explore="disagreement"`` only."""

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


def _entry(function: F) -> F:
    """Let ``function`` take an array or :class:`LatentState`, and compile it when it is not called in a trace."""
    run = compiled(function)

    @functools.wraps(function)
    def call(model: PlannerModel, z: jax.Array | LatentState, *args: Any, **kwargs: Any) -> Any:
        latent = _latent_array(z)
        if isinstance(model, WorldModel):
            # As it was given: what is on the host is checked there.
            return run(model, z.z if isinstance(z, LatentState) else z, *args, **kwargs)
        _check_model(model)
        bound = functools.partial(function, model)
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((latent, args, kwargs)))
        return bound(latent, *args, **kwargs) if traced else jax.jit(bound)(latent, *args, **kwargs)

    return call  # type: ignore[return-value]


@_entry
def plan(
    model: PlannerModel,
    z: jax.Array | LatentState,
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
      z: [L], or [B, L] for B environments, each with a plan of its own; an array or the state that ``encode`` returns.
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

    Raises:
      DataError: ``z`` or ``previous_mean`` has another shape, or ``z`` is no latent of TD-MPC2.
      TypeError: ``model`` lacks methods of :class:`PlannerModel`.
    """
    z = _latent_array(z)
    c = model.config
    batch, needed = z.shape[:-1], (*z.shape[:-1], c.horizon, c.action_dim)
    if z.ndim not in (1, 2) or jnp.shape(previous_mean) != needed:
        raise DataError(
            f"z has shape {z.shape} and previous_mean {jnp.shape(previous_mean)}; plan takes [L] with "
            f"[{c.horizon}, {c.action_dim}], or [B, L] with [B, {c.horizon}, {c.action_dim}]."
        )
    pair_key, plan_key = split_key(key, 2)
    # One pair of Q networks per iteration, shared by all environments: their weights are then gathered once.
    iterations = c.planner_iterations
    q_pairs = jax.vmap(model.q_pair, axis_size=iterations)(step_keys(pair_key, iterations))

    def plan_one(z, previous_mean, key, noise, task):  # type: ignore[no-untyped-def]
        return _plan_one(model, z, previous_mean, q_pairs, key, noise, task, explore)

    if not batch:
        return plan_one(z, previous_mean, plan_key, noise, task)
    keys = step_keys(plan_key, batch[0])
    return jax.vmap(plan_one)(z, previous_mean, keys, noise, task)


@_entry
def score(
    model: PlannerModel,
    z: jax.Array | LatentState,
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
      z: [L] or [1, L], the latent that all sequences start from, or [N, L], one for each; an array or the state that
        ``encode`` returns.
      actions: [H, N, A] with the config's H.
      key: key of the last action and the pair of Q networks; None is the prior's mode and the first two.
      task: [] for multitask models.

    Returns:
      [N] values in the units of the data.

    Raises:
      DataError: ``z`` or ``actions`` has another shape, or ``z`` is no latent of TD-MPC2.
      TypeError: ``model`` lacks methods of :class:`PlannerModel`.
    """
    z = _latent_array(z)
    c = model.config
    shape = jnp.shape(actions)
    if len(shape) != 3 or (shape[0], shape[2]) != (c.horizon, c.action_dim):
        raise DataError(f"actions has shape {shape}; score takes [H, N, A] = [{c.horizon}, N, {c.action_dim}].")
    if z.ndim not in (1, 2) or z.shape[:-1] not in ((), (1,), shape[1:2]):
        raise DataError(
            f"z has shape {z.shape}; score takes one latent [L] for all {shape[1]} sequences, or one for each, "
            f"[{shape[1]}, L]. For another of a batch: z[i]."
        )
    shared = z if z.ndim == 1 else z[0] if z.shape[0] == 1 else None
    pair_key, action_key = split_key(key, 2)
    candidates = planning.rollout(
        _transition(model, task),
        lambda t, z: actions[t],
        jnp.broadcast_to(z, (shape[1], z.shape[-1])),
        horizon=c.horizon,
        start=shared,
    )
    return _estimate(model, task)(_value(model, task), candidates, (action_key, model.q_pair(pair_key)))


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
    values = jnp.nan_to_num(values, nan=0.0)
    mean, std, elites, weights = planning.refit(
        actions, values, num_elites=num_elites, temperature=temperature, min_std=min_std, max_std=max_std
    )
    return mean, std, elites, weights


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
    mask = model.action_mask(task)
    estimate = _estimate(model, task)
    plan = planning.mppi(
        _transition(model, task, explore),
        _value(model, task),
        lambda z, key: model.prior(z, task, key).action,
        z,
        # The mean is warm-started, the std is not. Dimensions that the task does not have keep mean and std 0.
        planning.shift(previous_mean) * mask,
        key,
        actions=planning.CategoricalActions() if c.action_type == "discrete" else planning.GaussianActions(),
        iterations=c.planner_iterations,
        num_samples=c.num_samples,
        num_elites=c.num_elites,
        num_prior=c.num_pi_trajs,
        temperature=c.temperature,
        min_std=c.least_std * mask,
        max_std=c.max_std * mask,
        explore=explore,
        noise=noise,
        # As in the reference, and unlike mppi, which ignores such candidates: NaN counts as 0.
        estimate=lambda value, candidates, draw: jnp.nan_to_num(estimate(value, candidates, draw), nan=0.0),
        context=q_pairs,
        shared_start=True,
    )
    return plan.action, plan.mean


def _transition(model: PlannerModel, task: jax.Array | None, explore: bool | jax.Array = False) -> Transition:
    """Dynamics, rewards and discounts of one task; takes z [N, L], or [L] if shared.

    The intrinsic reward counts only while exploring: the scores of evaluations are not paid for it.
    """
    dynamics_reward, gamma = model.fused_dynamics_reward(task), model.gamma(task)

    def transition(z: jax.Array, action: jax.Array, key: jax.Array | None) -> Step:
        del key  # The dynamics are deterministic.
        before, (z, reward_logits) = z, dynamics_reward(z, action)
        # Nothing counts after a latent whose termination is more likely than not.
        discount = jnp.where(model.termination_logits(z) > 0.0, 0.0, gamma) if model.config.episodic else gamma
        reward = model.decode_scalar(reward_logits)
        if model.config.explore == "disagreement":
            before = jnp.broadcast_to(before, z.shape)
            reward += jnp.where(explore, model.intrinsic_reward(before, action, task), 0.0)
        return Step(z, reward, discount)

    return transition


def _value(model: PlannerModel, task: jax.Array | None) -> Value:
    """E[Q(z, a~π(z))] of z [N, L]: [N]. A draw is the key of the action and the indices [2] of the Q networks."""

    def value(z: jax.Array, draw: tuple[jax.Array | None, jax.Array]) -> jax.Array:
        key, q_pair = draw
        return model.prior(z, task, key).expect(lambda action: model.q_values(z, action, task, q_pair).mean(0))

    return value


def _estimate(model: PlannerModel, task: jax.Array | None) -> Estimate:
    """Values [N] of candidates, see :func:`score`; draws as for :func:`_value`."""
    lambda_ = model.config.value_lambda

    def estimate(value: Value | None, candidates: Candidates, draw: tuple[jax.Array | None, jax.Array]) -> jax.Array:
        # The longest estimate: all rewards, then the prior's value at the last latent.
        mixed = planning.bootstrapped_return(value, candidates, draw)
        if lambda_ == 1.0:
            return mixed
        # The λ-mixture from its end: V_h = (1 − λ)·(rewards up to h + γʰ·Q(z_h, a_h)) + λ·V_{h+1}.
        steps = zip(*(reversed(part[: len(candidates.actions)]) for part in candidates), strict=True)
        for action, reward, discount, z in steps:
            q = model.q_values(z, action, task, draw[1]).mean(0)
            mixed = (1.0 - lambda_) * (reward + discount * q) + lambda_ * mixed
        return mixed

    return estimate


def _latent_array(z: Any) -> jax.Array:
    """``z`` [..., L] of an array or :class:`LatentState`. Raises ``DataError`` for anything else."""
    latent = z.z if isinstance(z, LatentState) else z
    if isinstance(latent, np.ndarray):
        latent = jnp.asarray(latent)
    if not isinstance(latent, jax.Array) or latent.ndim == 0:
        raise DataError(
            f"z is a {type(z).__name__}; the planner takes a latent of TD-MPC2: an array [L] or [B, L], or the "
            "LatentState that model.encode returns. For other models, see worldloom.planning.mppi."
        )
    return latent


def _check_model(model: Any) -> None:
    """Raise ``TypeError`` naming the methods of :class:`PlannerModel` that ``model`` lacks."""
    needed = ["config", *(name for name in vars(PlannerModel) if not name.startswith("_"))]
    missing = [name for name in needed if not hasattr(model, name)]
    config = getattr(model, "config", None)
    unused = {"termination_logits": not getattr(config, "episodic", True), "intrinsic_reward": True}
    missing = [name for name in missing if not unused.get(name)]
    if missing:
        raise TypeError(
            f"The planner needs a model with the attributes of planner.PlannerModel; {type(model).__name__} lacks "
            f"{', '.join(missing)}. A model with functions of another kind can plan by worldloom.planning.mppi."
        )
