"""MPPI and the cross-entropy method: sample action sequences, roll them out in a model, refit to the best, repeat."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from worldloom.config import check, is_integer, is_number
from worldloom.errors import DataError
from worldloom.ops.keys import split_key, step_keys
from worldloom.planning.actions import ActionSampler, GaussianActions
from worldloom.planning.stages import bootstrapped_return, refit, rollout
from worldloom.planning.types import Candidates, Estimate, Latent, Plan, Prior, Transition, Value

_DEFAULT_ACTIONS = GaussianActions()


def mppi(
    transition: Transition,
    value: Value | None,
    prior: Prior | None,
    latent: Latent,
    mean: jax.Array,
    key: jax.Array | None = None,
    *,
    actions: ActionSampler = _DEFAULT_ACTIONS,
    iterations: int = 6,
    num_samples: int = 512,
    num_elites: int = 64,
    num_prior: int = 24,
    temperature: float | jax.Array = 0.5,
    min_std: float | jax.Array = 0.05,
    max_std: float | jax.Array = 2.0,
    explore: bool | jax.Array = False,
    noise: jax.Array | None = None,
    estimate: Estimate = bootstrapped_return,
    context: Any = None,
    shared_start: bool = False,
) -> Plan:
    """Model predictive path integral control with a policy prior (Williams et al. 2015; TD-MPC2's ``TDMPC2._plan``).

    Each iteration draws candidates around the mean, rolls them out together with those of the prior, and refits mean
    and standard deviation to the best ones, weighted by exp(temperature · value). A pure function of arrays:
    ``jax.jit`` it with the callables closed over, and ``jax.vmap`` it over latents, means and keys for a batch.

    Args:
      transition: latents [N, ...], actions [N, A], key → :class:`Step`.
      value: latents [N, ...], key → values [N] of what follows the last step; None is 0.
      prior: latents [N, ...], key → actions [N, A]; None proposes no candidates.
      latent: [...] to plan from, a pytree without an axis of candidates.
      mean: [H, A] to start from; its length is the horizon. Zeros, or ``shift(plan.mean)`` of the previous plan.
      key: key of all draws, consumed. None: candidates from a fixed key, the mode of all other draws, the best elite,
        no exploration; the callables then get None in place of keys.
      actions: how candidates are drawn, with their bounds: :class:`GaussianActions` or :class:`CategoricalActions`.
      iterations: refinements, at least 1.
      num_samples: candidates per iteration, those of the prior included.
      num_elites: best candidates that the next distribution is fitted to.
      num_prior: candidates that ``prior`` proposes, rolled out once and kept in every iteration; 0 without a prior.
      temperature: factor on the values in the weights, in units of 1 / value.
      min_std: lower bound of the standard deviation, [] or [A]; 0 pins a dimension to its mean.
      max_std: upper bound, and the standard deviation of the first iteration, [] or [A].
      explore: add noise of the last standard deviation to the action; needs a key.
      noise: [iterations, H, num_samples − num_prior, A], in place of the candidates' standard noise (tests).
      estimate: values of candidates from rollouts and ``value``, :data:`Estimate`.
      context: pytree [iterations, ...]; ``value`` and ``estimate`` get (key, row i) in iteration i in place of the key.
      shared_start: at the first step of drawn candidates, call ``transition`` with ``latent`` itself, without the axis
        of candidates; see :func:`rollout`.

    Returns:
      The plan. ``action`` is the first one of an elite drawn by weight, not of the mean. Candidates whose value or
      actions are NaN are ignored.

    Raises:
      ConfigError: a size or bound is out of its range.
      DataError: ``mean``, ``noise`` or what a callable returns has another shape.
    """
    search = _search(
        transition, value, prior, latent, mean, key, actions=actions, iterations=iterations, num_samples=num_samples,
        num_elites=num_elites, num_prior=num_prior, temperature=temperature, min_std=min_std, max_std=max_std,
        noise=noise, estimate=estimate, context=context, shared_start=shared_start,
    )  # fmt: skip
    key = search.choice_key
    chosen = 0 if key is None else jax.random.categorical(key, jnp.log(search.plan.elite_weights))
    return _finish(search, search.plan.elite_actions[chosen], actions, explore)


def cem(
    transition: Transition,
    value: Value | None,
    prior: Prior | None,
    latent: Latent,
    mean: jax.Array,
    key: jax.Array | None = None,
    *,
    actions: ActionSampler = _DEFAULT_ACTIONS,
    iterations: int = 6,
    num_samples: int = 512,
    num_elites: int = 64,
    num_prior: int = 24,
    min_std: float | jax.Array = 0.05,
    max_std: float | jax.Array = 2.0,
    explore: bool | jax.Array = False,
    noise: jax.Array | None = None,
    estimate: Estimate = bootstrapped_return,
    context: Any = None,
    shared_start: bool = False,
) -> Plan:
    """The cross-entropy method (Rubinstein 1999; in a latent space: PlaNet, Hafner et al. 2019).

    As :func:`mppi`, with two differences: all elites weigh the same, so that only the order of the values matters; and
    ``action`` is the mode of the last distribution at its first step. Arguments and errors are those of :func:`mppi`.
    """
    search = _search(
        transition, value, prior, latent, mean, key, actions=actions, iterations=iterations, num_samples=num_samples,
        num_elites=num_elites, num_prior=num_prior, temperature=0.0, min_std=min_std, max_std=max_std, noise=noise,
        estimate=estimate, context=context, shared_start=shared_start,
    )  # fmt: skip
    return _finish(search, actions.mode(search.plan.mean[0]), actions, explore)


class _Search(NamedTuple):
    """The plan of the last iteration, its action not chosen yet, and the keys that are left."""

    plan: Plan
    choice_key: jax.Array | None
    explore_key: jax.Array | None


def _search(
    transition: Transition,
    value: Value | None,
    prior: Prior | None,
    latent: Latent,
    mean: jax.Array,
    key: jax.Array | None,
    *,
    actions: ActionSampler,
    iterations: int,
    num_samples: int,
    num_elites: int,
    num_prior: int,
    temperature: float | jax.Array,
    min_std: float | jax.Array,
    max_std: float | jax.Array,
    noise: jax.Array | None,
    estimate: Estimate,
    context: Any,
    shared_start: bool,
) -> _Search:
    """All iterations of a planner; arguments as for :func:`mppi`."""
    num_prior = 0 if prior is None else num_prior
    _check_sizes(iterations, num_samples, num_elites, num_prior, temperature, min_std, max_std)
    mean = _check_mean(mean)
    min_std, max_std = (jnp.asarray(bound, jnp.float32) for bound in (min_std, max_std))
    bounds = {"min_std": min_std, "max_std": max_std}
    bounds |= {name: getattr(actions, name) for name in ("low", "high") if hasattr(actions, name)}
    _check_bounds(bounds, mean.shape[1])
    horizon, num_drawn = mean.shape[0], num_samples - num_prior
    prior_key, noise_key, value_key, choice_key, explore_key = split_key(key, 5)
    # The sixth key: splitting into six would change the other five where threefry is not partitionable.
    prior_step_key, step_key = split_key(None if key is None else jax.random.fold_in(key, 5), 2)

    # Candidates of the prior: they compete in every iteration and are rolled out once.
    proposed = None
    if prior is not None and num_prior:
        proposed = _propose(
            transition, prior, _repeat(latent, num_prior), mean.shape, actions, prior_key, prior_step_key
        )

    # Sampling distribution and noise of all iterations.
    std = jnp.broadcast_to(jnp.asarray(max_std, mean.dtype), mean.shape)
    shape = (iterations, horizon, num_drawn, mean.shape[1])
    if noise is None:
        noise = actions.noise(jax.random.key(0) if noise_key is None else noise_key, shape)
    elif jnp.shape(noise) != shape:
        raise DataError(f"noise has shape {jnp.shape(noise)}; [iterations, H, drawn candidates, A] is {shape}.")
    latents = _repeat(latent, num_drawn)

    # Refinement: sample, roll out, estimate, refit.
    def refine(distribution, inputs):  # type: ignore[no-untyped-def]
        noise, value_key, step_key, row = inputs
        mean, std = distribution
        drawn = actions.sample(mean[:, None], std[:, None], noise)
        candidates = rollout(
            transition,
            lambda t, latents: drawn[t],
            latents,
            horizon=horizon,
            key=step_key,
            start=latent if shared_start else None,
        )
        if proposed is not None:
            candidates = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), proposed, candidates)
        values = estimate(value, candidates, value_key if context is None else (value_key, row))
        sequences, values = _ignore_nan(jnp.stack(candidates.actions), values)
        mean, std, elites, weights = refit(
            sequences, values, num_elites=num_elites, temperature=temperature, min_std=min_std, max_std=max_std
        )
        return (mean, std), (sequences[0, elites], values[elites], weights)

    inputs = (noise, step_keys(value_key, iterations), step_keys(step_key, iterations), context)
    (mean, std), elites = jax.lax.scan(refine, (mean, std), inputs)
    first_actions, values, weights = (last[-1] for last in elites)
    plan = Plan(first_actions[0], mean, std, first_actions, values, weights)
    return _Search(plan, choice_key, explore_key)


def _propose(
    transition: Transition,
    prior: Prior,
    latents: Latent,
    shape: tuple[int, ...],
    actions: ActionSampler,
    key: jax.Array | None,
    step_key: jax.Array | None,
) -> Candidates:
    """Candidates from ``latents`` [N, ...] whose actions are draws of the prior; ``shape`` is (H, A)."""
    keys = split_key(key, shape[0])
    needed = (jax.tree.leaves(latents)[0].shape[0], shape[1])

    def choose(t: int, latents: Latent) -> jax.Array:
        action = prior(latents, keys[t])
        if jnp.shape(action) != needed:
            raise DataError(f"prior returned actions of shape {jnp.shape(action)}; [N, A] is {needed}.")
        return actions.clip(action)

    return rollout(transition, choose, latents, horizon=shape[0], key=step_key)


def _finish(search: _Search, action: jax.Array, actions: ActionSampler, explore: bool | jax.Array) -> Plan:
    """The plan with ``action`` [A], and exploration noise on it if asked for."""
    if search.explore_key is not None:
        noisy = actions.sample(action, search.plan.std[0], actions.noise(search.explore_key, action.shape))
        action = jnp.where(explore, noisy, action)
    return search.plan._replace(action=actions.clip(action))


def _repeat(latent: Latent, count: int) -> Latent:
    """[...] → [count, ...], without copies."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), latent)


def _ignore_nan(sequences: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Actions [H, N, A] with 0 for NaN, and values [N] with NaN for the candidates that had one."""
    if values.shape != sequences.shape[1:2]:
        raise DataError(
            f"The values of {sequences.shape[1]} candidates have shape {values.shape}; value and estimate return [N]."
        )
    broken = jnp.isnan(sequences)
    return jnp.where(broken, 0.0, sequences), jnp.where(broken.any(axis=(0, 2)), jnp.nan, values)


def _check_mean(mean: Any) -> jax.Array:
    shape = jnp.shape(mean)
    if len(shape) != 2 or 0 in shape:
        raise DataError(
            f"mean has shape {shape}; a plan of H steps with A action dimensions starts from [H, A], for example "
            "jnp.zeros((H, A)). For a batch of latents, use jax.vmap."
        )
    return jnp.asarray(mean, jnp.float32)


def _check_bounds(bounds: dict[str, Any], width: int) -> None:
    """Raise ``DataError`` for bounds of another shape than [] or [A]."""
    for name, bound in bounds.items():
        if jnp.shape(bound) not in ((), (width,)):
            raise DataError(f"{name} has shape {jnp.shape(bound)}; it is one number, or [A] = [{width}] of them.")


def _check_sizes(
    iterations: int, num_samples: int, num_elites: int, num_prior: int, temperature: Any, min_std: Any, max_std: Any
) -> None:
    """Raise ``ConfigError`` for sizes and bounds out of range; arrays are not checked, they may be traced."""
    for name, number in (("iterations", iterations), ("num_samples", num_samples), ("num_elites", num_elites)):
        check(is_integer(number) and number >= 1, f"{name}={number!r} must be an integer of at least 1.")
    check(is_integer(num_prior) and num_prior >= 0, f"num_prior={num_prior!r} must be an integer of at least 0.")
    check(num_elites <= num_samples, f"num_elites={num_elites} must not exceed num_samples={num_samples}.")
    check(num_prior < num_samples, f"num_prior={num_prior} must be below num_samples={num_samples}.")
    numbers = {"temperature": temperature, "min_std": min_std, "max_std": max_std}
    numbers = {name: number for name, number in numbers.items() if is_number(number)}
    for name, number in numbers.items():
        check(number >= 0, f"{name}={number} must be at least 0.")
    if len({"min_std", "max_std"} & numbers.keys()) == 2:
        check(min_std <= max_std, f"min_std={min_std} must not exceed max_std={max_std}.")
