"""Optimizers of the reference programs as Optax transforms."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


def warmup_schedule(learning_rate: float, warmup_steps: int) -> optax.Schedule:
    """``learning_rate · min(1, n / warmup_steps)`` where n counts updates from 0, so update 1 of a warm-up has rate 0.

    The counting is that of DreamerV3's optimizer; ``warmup_steps=0`` is constant from the first update on.
    """
    if warmup_steps == 0:
        return optax.constant_schedule(learning_rate)
    return lambda count: learning_rate * jnp.minimum(1.0, count / warmup_steps)


def clip_by_agc(clip: float = 0.3, minimum_norm: float = 1e-3) -> optax.GradientTransformation:
    """Adaptive gradient clipping per parameter *tensor*: ``g / max(1, ‖g‖ / (clip · max(minimum_norm, ‖p‖)))``.

    Brock et al. 2021 clip per unit; DreamerV3 (``clip_by_agc``) takes whole-tensor L2 norms, biases and scales
    included. ``clip=0`` turns it off.
    """

    def shrink(g: jax.Array, p: jax.Array) -> jax.Array:
        upper = clip * jnp.maximum(minimum_norm, _norm(p))
        return g / jnp.maximum(1.0, _norm(g) / upper)

    def update(updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None) -> tuple:
        if params is None:
            raise ValueError("clip_by_agc needs the parameters: call update(grads, state, params).")
        return jax.tree.map(shrink, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update) if clip else optax.identity()


class LaPropState(NamedTuple):
    """``step`` int32 [], first moment ``mu`` of the normalised gradient, second moment ``nu`` of the gradient."""

    step: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def scale_by_laprop(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-20) -> optax.GradientTransformation:
    """LaProp (Ziyin et al. 2020): momentum on the *normalised* gradient, both moments bias-corrected.

    ν ← b2·ν + (1−b2)·g²;  u = g / (√ν̂ + eps);  μ ← b1·μ + (1−b1)·u;  the update is μ̂.
    DreamerV3's ``scale_by_rms`` followed by ``scale_by_momentum``.
    """

    def init(params: optax.Params) -> LaPropState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        return LaPropState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(updates: optax.Updates, state: LaPropState, params: optax.Params | None = None) -> tuple:
        del params
        step = optax.safe_increment(state.step)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)
        normalised = jax.tree.map(lambda g, v: g / (jnp.sqrt(v / (1 - b2 ** step.astype(g.dtype))) + eps), updates, nu)
        mu = jax.tree.map(lambda m, u: b1 * m + (1 - b1) * u, state.mu, normalised)
        debiased = jax.tree.map(lambda m: m / (1 - b1 ** step.astype(m.dtype)), mu)
        return debiased, LaPropState(step, mu, nu)

    return optax.GradientTransformation(init, update)


def clip_by_norm(maximum: float) -> optax.GradientTransformation:
    """Scale all gradients together by ``min(1, maximum / (‖g‖ + 1e-6))`` as PyTorch's ``clip_grad_norm_`` does.

    ``maximum=0`` turns it off.
    """

    def update(updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None) -> tuple:
        del params
        scale = jnp.minimum(1.0, maximum / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update) if maximum else optax.identity()


def decay_kernels(weight_decay: float) -> optax.GradientTransformation:
    """Decoupled weight decay on matrices and convolutions only: leaves whose last path part is ``kernel``."""

    def kernels(params: optax.Params) -> optax.Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", None) == "kernel", params)

    return optax.add_decayed_weights(weight_decay, mask=kernels) if weight_decay else optax.identity()


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x)))
