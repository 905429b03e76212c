"""Parts of the reference programs' optimizers as Optax transforms.

DreamerV3's are in ``embodied/jax/opt.py`` of danijar/dreamerv3; TD-MPC2 uses PyTorch's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def warmup_schedule(learning_rate: float, warmup_steps: int) -> optax.Schedule:
    """``learning_rate · min(1, n / warmup_steps)`` for update n = 0, 1, …: the first update has rate 0.

    Counts as DreamerV3's optimizer does. ``warmup_steps=0`` means a constant rate from the first update on.
    """
    if warmup_steps == 0:
        return optax.constant_schedule(learning_rate)
    return lambda count: learning_rate * jnp.minimum(1.0, count / warmup_steps)


def learning_rate_schedule(training: Any) -> optax.Schedule:
    """Learning rate of update n = 0, 1, … under a ``TrainingConfig``: its warm-up times its ``lr_schedule``.

    ``linear`` and ``cosine`` fall from 1 after the warm-up to 0 after ``total_steps`` updates.
    """
    warmup = warmup_schedule(training.learning_rate, training.warmup_steps)
    if training.lr_schedule == "constant":
        return warmup
    steps = max(training.total_steps - training.warmup_steps, 1)
    decay = optax.linear_schedule(1.0, 0.0, steps)
    if training.lr_schedule == "cosine":
        decay = optax.cosine_decay_schedule(1.0, steps)
    return lambda count: warmup(count) * decay(jnp.maximum(count - training.warmup_steps, 0))


def clip_by_agc(clip: float = 0.3, minimum_norm: float = 1e-3) -> optax.GradientTransformation:
    """Adaptive gradient clipping per parameter tensor: ``g / max(1, ‖g‖ / (clip · max(minimum_norm, ‖p‖)))``.

    Brock et al. 2021 (arXiv 2102.06171, section 4) clip per unit. DreamerV3 (``opt.py: clip_by_agc``) uses the L2 norm
    of whole tensors, biases and scales included. ``clip=0`` turns it off.
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
    """``step`` int32 []; ``mu``, first moment of the normalised gradient; ``nu``, second moment of the gradient."""

    step: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def scale_by_laprop(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-20) -> optax.GradientTransformation:
    """LaProp (Ziyin et al. 2020, arXiv 2002.04839): momentum on the *normalised* gradient.

    ν ← b2·ν + (1 − b2)·g²
    u = g / (√ν̂ + eps)
    μ ← b1·μ + (1 − b1)·u
    The update is μ̂; hats are bias-corrected: ν̂ = ν / (1 − b2ⁿ), μ̂ = μ / (1 − b1ⁿ) in update n = 1, 2, ….
    DreamerV3 composes it of ``opt.py: scale_by_rms`` and ``scale_by_momentum``.
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
    """Scale all gradients by ``min(1, maximum / (‖g‖ + 1e-6))``, where ‖g‖ is their global L2 norm.

    The 1e-6 is that of PyTorch's ``torch.nn.utils.clip_grad_norm_``, which TD-MPC2 uses; Optax's
    ``clip_by_global_norm`` has none. ``maximum=0`` turns it off.
    """

    def update(updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None) -> tuple:
        del params
        scale = jnp.minimum(1.0, maximum / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * scale, updates), state

    return (
        optax.GradientTransformation(lambda params: optax.EmptyState(), update) if _is_on(maximum) else optax.identity()
    )


def decay_kernels(weight_decay: float) -> optax.GradientTransformation:
    """Decoupled weight decay of matrices and convolutions only: parameters named ``kernel``. 0 turns it off."""

    def kernels(params: optax.Params) -> optax.Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", None) == "kernel", params)

    return optax.add_decayed_weights(weight_decay, mask=kernels) if _is_on(weight_decay) else optax.identity()


def _is_on(value: Any) -> bool:
    """Whether a setting is not 0. One that is varied between the members of a program is an array, and never is."""
    return isinstance(value, jax.core.Tracer) or bool(value)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x)))
