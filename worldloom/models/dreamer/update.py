"""One update of DreamerV3: a joint step of all parts, then the slow critic."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from worldloom.devices import compute_dtype
from worldloom.models.base import merge
from worldloom.models.dreamer.config import DreamerV3Config
from worldloom.models.dreamer.losses import LossOutput, update_return_range
from worldloom.models.dreamer.world_model import ActorCarry, DreamerV3WorldModel, zero_carry
from worldloom.models.parts import join_rows, over_parts, part_keys, split_rows
from worldloom.optim import clip_by_agc, clip_by_norm, decay_kernels, scale_by_laprop, warmup_schedule
from worldloom.state import TrainState, WindowSpec

RANDOM_PREFILL = False
"""Online training begins with what the untrained policy does, so that latents are stored from the first row on."""


def optimizer(config: DreamerV3Config, training: Any) -> optax.GradientTransformation:
    """AGC → global clip → LaProp → decoupled weight decay → warmed-up learning rate."""
    return optax.chain(
        clip_by_agc(config.agc),
        clip_by_norm(training.grad_clip),
        # As one vector: its steps look at no tensor as a whole, and would be three programs for each.
        optax.flatten(scale_by_laprop(config.beta1, config.beta2, config.eps)),
        decay_kernels(training.weight_decay),
        optax.scale_by_learning_rate(warmup_schedule(training.learning_rate, training.warmup_steps)),
    )


def init_state(model: DreamerV3WorldModel, training_config: Any, key: jax.Array) -> TrainState:
    """The state before the first update under a ``TrainingConfig``; ``key`` is the root of the run.

    Weights and key are copies, so that updates may donate the state.
    """
    return _first_state(model.config, training_config, model.params, key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first_state(config: DreamerV3Config, training: Any, params: dict[str, Any], key: jax.Array) -> TrainState:
    """One program in place of some for every weight."""
    params, key = jax.tree.map(jnp.copy, (params, key))
    opt_state = optimizer(config, training).init(_split(params)[0])
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, key, config, training)


def update(
    state: TrainState, batch: Mapping[str, Any], key: jax.Array | None
) -> tuple[TrainState, dict[str, jax.Array | dict[str, jax.Array]]]:
    """One optimizer step on a batch [B, T, ...]; pure, to be jitted by the caller.

    Returns:
      The new state and metrics: the loss terms, ``grad_norm`` (before any clipping), ``lr``, and with
      ``config.replay_context`` under ``"replay"`` the fresh latents ``deter`` and ``stoch`` [B, T, ...] (float32) of
      the batch's last T rows: all rows, or all but the context row.
    """
    config, training = state.config, state.training
    trained, fixed = _split(state.params)

    def gradients(batch: Mapping[str, Any], key: jax.Array | None, scale: jax.Array | None = None) -> Any:
        def objective(trained: dict[str, Any]) -> tuple[jax.Array, LossOutput]:
            model = merge(DreamerV3WorldModel, config, {**trained, **fixed})
            out = model.losses(batch, key, scale=scale, remat=training.remat)
            return out.total, out

        grads, out = jax.grad(objective, has_aux=True)(trained)
        return (grads, out.terms), (out.latents, out.returns, out.return_range, out.metrics)

    whole = training.microbatches == 1
    (grads, terms), aux = gradients(batch, key) if whole else _in_parts(gradients, state, batch, key)
    latents, _, return_range, extras = aux
    updates, opt_state = optimizer(config, training).update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    rate = config.slow_critic_rate
    slow = jax.tree.map(lambda old, new: (1 - rate) * old + rate * new, fixed["slow_critic"], trained["critic"])
    params = {**trained, "slow_critic": slow, "return_range": return_range}

    learning_rate = warmup_schedule(training.learning_rate, training.warmup_steps)(state.step)
    metrics = terms | extras | {"grad_norm": optax.tree.norm(grads), "lr": jnp.asarray(learning_rate)}
    if config.replay_context:
        metrics["replay"] = {
            "deter": latents.deter.astype(jnp.float32),
            "stoch": latents.stoch.astype(jnp.float32),
        }
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


def _in_parts(gradients: Callable[..., Any], state: TrainState, batch: Mapping[str, Any], key: jax.Array | None) -> Any:
    """What ``gradients`` of the whole batch gives, from one part of it at a time; each part draws with its own key.

    Every term is a mean over the batch, so gradients average; but advantages are divided by a range of *all* returns.
    The actor's gradient is affine in 1 / scale: each part is worked out at the scale so far, with its slope, and the
    average moved to the scale of the whole batch.
    """
    before = state.params["return_range"]
    inverse = 1 / jnp.maximum(1.0, before["hi"] - before["lo"])
    parts = state.training.microbatches

    def part(inputs: tuple[Any, jax.Array | None]) -> Any:
        rows, key = inputs
        at_scale = lambda inverse: gradients(rows, key, 1 / inverse)  # noqa: E731
        means, (grad_slopes, term_slopes), aux = jax.jvp(at_scale, (inverse,), (jnp.ones(()),), has_aux=True)
        latents, returns, _, extras = aux
        return (means, (grad_slopes["actor"], term_slopes), extras), (latents, returns)

    averaged, (latents, returns) = over_parts(part, (split_rows(dict(batch), parts), part_keys(key, parts)))
    (grads, terms), (actor_slope, term_slopes), extras = averaged
    return_range, scale = update_return_range(before, returns, state.config.return_range_rate)
    moved = functools.partial(jax.tree.map, lambda mean, slope: mean + (1 / scale - inverse) * slope)
    grads = {**grads, "actor": moved(grads["actor"], actor_slope)}
    return (grads, moved(terms, term_slopes)), (
        join_rows(latents),
        returns,
        return_range,
        extras | {"return_scale": scale},
    )


def act(
    state: TrainState, carry: ActorCarry | None, obs: Any, key: jax.Array | None, *, is_first: jax.Array | None = None
) -> tuple[ActorCarry, Any]:
    """The policy of the weights in ``state``; see :meth:`DreamerV3WorldModel.act`."""
    return merge(DreamerV3WorldModel, state.config, state.params).act(carry, obs, key, is_first=is_first)


act_in_evaluation = act
"""The reference's evaluation mode changes nothing: latents and actions are drawn, and published scores are of that."""


def initial_carry(config: DreamerV3Config, batch_size: int) -> ActorCarry:
    """What :func:`act` starts from when all environments are about to show their first observation."""
    return zero_carry(config, batch_size, compute_dtype(config.precision))


def window(config: DreamerV3Config, training: Any) -> WindowSpec:
    """Windows of ``sequence_length`` rows, plus a context row whose stored latent they start from.

    They run across episode ends: ``is_first`` resets the state inside.
    """
    latents = {"deter": (config.deter_dim,), "stoch": (config.num_latents, config.num_categories)}
    context = config.replay_context
    return WindowSpec(training.sequence_length + context, True, latents if context else {})


def stored_latents(carry: ActorCarry) -> dict[str, jax.Array]:
    """What to store beside the rows just acted on, [B, ...] float32; see :func:`window`."""
    return {"deter": carry.latent.deter.astype(jnp.float32), "stoch": carry.latent.stoch.astype(jnp.float32)}


def _split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    untrained = DreamerV3WorldModel.untrained
    return {k: v for k, v in params.items() if k not in untrained}, {k: params[k] for k in untrained}
