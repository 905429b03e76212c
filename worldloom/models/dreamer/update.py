"""One update of DreamerV3: a joint step of all parts, then the slow critic."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from worldloom.algorithm import LATENTS, Batch, Params, ReplaySpec, TrainState, Update
from worldloom.config import check
from worldloom.devices import compute_dtype
from worldloom.models.base import check_new_metrics
from worldloom.models.compilation import freeze_constants, merge
from worldloom.models.disagreement import advance
from worldloom.models.dreamer.config import DreamerV3Config
from worldloom.models.dreamer.losses import update_return_range
from worldloom.models.dreamer.world_model import ActorCarry, DreamerV3WorldModel, zero_carry
from worldloom.models.microbatch import accumulate, join_rows, part_keys, split_rows
from worldloom.optim import clip_by_agc, clip_by_norm, decay_kernels, learning_rate_schedule, scale_by_laprop

_OWN_PARTS = frozenset({*DreamerV3WorldModel.__annotations__} - {"config", "loss_terms"})
"""Names of the parts that the family itself has."""


def optimizer(config: DreamerV3Config, training: Any) -> optax.GradientTransformation:
    """AGC → global clip → LaProp → decoupled weight decay → warmed-up learning rate (``Agent._make_opt``)."""
    # Elementwise, so it may run on one flat vector; per tensor it would compile to three programs for each. Weights
    # that are divided over devices are not collected for that: there the state is divided as they are.
    laprop = scale_by_laprop(config.beta1, config.beta2, config.eps)
    return optax.chain(
        clip_by_agc(config.agc),
        clip_by_norm(training.grad_clip),
        laprop if training.divides_weights else optax.flatten(laprop),
        decay_kernels(training.weight_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(training)),
    )


def init_state(model: DreamerV3WorldModel, training_config: Any, key: jax.Array) -> TrainState:
    """The state before the first update under a ``TrainingConfig``; ``key`` is the root of the run.

    Weights and key are copies, so that updates may donate the state.
    """
    return _first_state(type(model), model.config, training_config, model.params, key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _first_state(cls: type, config: DreamerV3Config, training: Any, params: Params, key: jax.Array) -> TrainState:
    # Compiled as one program: eager copies would dispatch several for every weight.
    params, key = jax.tree.map(jnp.copy, (params, key))
    opt_state = optimizer(config, training).init(_split(cls, params)[0])
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, key)


def make_update(
    config: DreamerV3Config, training: Any, *, model_class: type[DreamerV3WorldModel] = DreamerV3WorldModel
) -> Update:
    """The update of a model under a ``TrainingConfig``; both are closed over.

    Args:
      config: of the model.
      training: learning rate, clipping, weight decay, ``microbatches`` and ``remat`` are read.
      model_class: :class:`DreamerV3WorldModel` or a subclass, whose ``losses`` method is what is minimised.

    Returns:
      ``update(state, batch, key)``: one optimizer step on a batch [B, T, ...]; pure, to be jitted by the caller. Its
      metrics are the loss terms, ``grad_norm`` (before any clipping), ``lr``, and with ``config.replay_context`` under
      ``"replay"`` the fresh latents ``deter`` and ``stoch`` [B, T, ...] (float32) of the batch's last T rows: all rows,
      or all but the context row.
    """

    def update(state: TrainState, batch: Batch, key: jax.Array | None) -> tuple[TrainState, dict[str, Any]]:
        trained, fixed = _split(model_class, state.params)

        def gradients(batch: Batch, key: jax.Array | None, scale: jax.Array | None = None) -> Any:
            def objective(trained: Params) -> Any:
                model = merge(model_class, config, {**trained, **fixed})
                out = model.losses(batch, key, scale=scale, remat=training.remat)
                return out.total, out

            grads, out = jax.grad(objective, has_aux=True)(trained)
            return (grads, out.terms), (out.latents, out.returns, out.return_range, out.metrics)

        if training.microbatches == 1:
            (grads, terms), (latents, _, return_range, extras) = gradients(batch, key)
        else:
            (grads, terms), (latents, return_range, extras) = _accumulated(
                gradients, state.params["return_range"], batch, key, training.microbatches, config.return_range_rate
            )
        grads = freeze_constants(model_class, config, grads)
        steps, opt_state = optimizer(config, training).update(grads, state.opt_state, trained)
        trained = optax.apply_updates(trained, steps)
        rate = config.slow_critic_rate
        slow = jax.tree.map(lambda old, new: (1 - rate) * old + rate * new, fixed["slow_critic"], trained["critic"])
        params = {**fixed, **trained, "slow_critic": slow, "return_range": return_range}
        if config.explore == "disagreement":
            extras["explore_spread"] /= jnp.maximum(extras.pop("explore_rows"), 1e-6)
            weight, updates = config.explore_weight, config.explore_updates
            params["explorer"] = advance(params["explorer"], extras["explore_spread"], weight=weight, updates=updates)
            extras["explore_weight"] = params["explorer"]["weight"]

        learning_rate = learning_rate_schedule(training)(state.step)
        extras |= {"grad_norm": optax.tree.norm(grads), "lr": jnp.asarray(learning_rate)}
        check_new_metrics(extras, terms)
        metrics = terms | extras
        if config.replay_context:
            metrics[LATENTS] = {
                "deter": latents.deter.astype(jnp.float32),
                "stoch": latents.stoch.astype(jnp.float32),
            }
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return update


def _accumulated(
    gradients: Callable[..., Any],
    return_range: Params,
    batch: Batch,
    key: jax.Array | None,
    parts: int,
    rate: float,
) -> Any:
    """Gradients and terms of the whole batch from one microbatch at a time; each draws with its own key.

    Every term is a mean over the batch, so gradients average. Only the advantages are not: they are divided by a range
    of *all* returns, which is known when the last microbatch is done. But the actor's gradient is affine in 1 / scale:
    each microbatch is computed at the scale so far together with its slope, and the average is then moved to the scale
    of the whole batch. So are the gradients of parts that a subclass has added, whose terms may read the actor's; a
    term of another power of 1 / scale is that of the scale so far, to first order.
    """
    inverse = 1 / jnp.maximum(1.0, return_range["hi"] - return_range["lo"])

    def part(inputs: tuple[Any, jax.Array | None]) -> Any:
        rows, key = inputs
        at_scale = lambda inverse: gradients(rows, key, 1 / inverse)  # noqa: E731
        means, (grad_slopes, term_slopes), aux = jax.jvp(at_scale, (inverse,), (jnp.ones(()),), has_aux=True)
        latents, returns, _, extras = aux
        moving = {name: slope for name, slope in grad_slopes.items() if name == "actor" or name not in _OWN_PARTS}
        return (means, (moving, term_slopes), extras), (latents, returns)

    averaged, (latents, returns) = accumulate(part, (split_rows(dict(batch), parts), part_keys(key, parts)))
    (grads, terms), (grad_slopes, term_slopes), extras = averaged
    return_range, scale = update_return_range(return_range, returns, rate)
    moved = functools.partial(jax.tree.map, lambda mean, slope: mean + (1 / scale - inverse) * slope)
    grads = {**grads, **{name: moved(grads[name], slope) for name, slope in grad_slopes.items()}}
    return (grads, moved(terms, term_slopes)), (join_rows(latents), return_range, extras | {"return_scale": scale})


def initial_carry(config: DreamerV3Config, num_envs: int) -> ActorCarry:
    """The policy's carry when all environments are about to show their first observation."""
    return zero_carry(config, num_envs, compute_dtype(config.precision))


def replay_spec(config: DreamerV3Config, training: Any) -> ReplaySpec:
    """Windows of ``sequence_length`` rows, plus a context row whose stored latent they start from.

    They run across episode ends: ``is_first`` resets the state inside. Fresh rows are replayed first, as by the online
    queue of the reference.

    Raises ``ConfigError`` for a ``sequence_length`` of 1: a loss needs two rows, the second led to by an action.
    """
    check(training.sequence_length >= 2, "sequence_length=1 leaves DreamerV3 no step to learn; give at least 2.")
    latents = {"deter": (config.deter_dim,), "stoch": (config.num_latents, config.num_categories)}
    context = config.replay_context
    return ReplaySpec(training.sequence_length + context, True, latents if context else {}, fresh_first=True)


def stored_latents(carry: ActorCarry) -> dict[str, jax.Array]:
    """Latents to store beside the rows just acted on, [B, ...] float32; see :func:`replay_spec`."""
    return {"deter": carry.latent.deter.astype(jnp.float32), "stoch": carry.latent.stoch.astype(jnp.float32)}


def _split(cls: type[Any], params: Params) -> tuple[Params, Params]:
    """Trained parts, and those that no gradient moves."""
    return {k: v for k, v in params.items() if k not in cls.untrained}, {k: params[k] for k in cls.untrained}
