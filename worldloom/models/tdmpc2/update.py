"""One update of TD-MPC2: a step of the model, a step of the policy against it, the targets' average."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from worldloom.algorithm import Batch, Params, ReplaySpec, TrainState, Update
from worldloom.errors import ConfigError, DataError
from worldloom.models.base import check_new_metrics
from worldloom.models.compilation import freeze_constants, merge
from worldloom.models.disagreement import advance
from worldloom.models.microbatch import accumulate, part_keys, split_rows
from worldloom.models.tdmpc2.batch import TrainBatch, prepare_batch
from worldloom.models.tdmpc2.config import TDMPC2Config
from worldloom.models.tdmpc2.losses import Rollouts, first_values, update_scale, with_f1
from worldloom.models.tdmpc2.networks import project_rows
from worldloom.models.tdmpc2.world_model import TDMPC2WorldModel
from worldloom.ops.keys import split_key
from worldloom.optim import clip_by_norm, decay_kernels, learning_rate_schedule

_OWN_PARTS = frozenset({*TDMPC2WorldModel.__annotations__, "policy"} - {"config", "loss_terms"})
"""Names of the parts that the family itself has."""


def init_state(model: TDMPC2WorldModel, training_config: Any, key: jax.Array) -> TrainState:
    """The state before the first update under a ``TrainingConfig``; ``key`` is the root of the run.

    Weights and key are copies, so that updates may donate the state.
    """
    return _first_state(type(model), model.config, training_config, model.params, key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _first_state(cls: type, config: TDMPC2Config, training: Any, params: Params, key: jax.Array) -> TrainState:
    # Compiled as one program: eager copies would dispatch several for every weight.
    params, key = jax.tree.map(jnp.copy, (params, key))
    opt_state = {
        "model": _model_optimizer(config, training).init(_model_part(cls, params)),
        "policy": _policy_optimizer(config, training).init(_policy_part(cls, params)),
        "policy_grad_of_tasks": jax.tree.map(jnp.zeros_like, _tasks(params)),
    }
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, key)


def make_update(
    config: TDMPC2Config, training: Any, *, model_class: type[TDMPC2WorldModel] = TDMPC2WorldModel
) -> Update:
    """The update of a model under a ``TrainingConfig``; both are closed over.

    The order is the reference's (``TDMPC2._update``): targets and model losses with the old weights; the model's step;
    the policy's step on the *old* latents against the *new* Q networks; the target networks last.

    Args:
      config: of the model.
      training: learning rate, clipping, weight decay, ``microbatches`` and ``remat`` are read.
      model_class: :class:`TDMPC2WorldModel` or a subclass, whose ``model_loss`` and ``policy_loss`` are minimised.

    Returns:
      ``update(state, batch, key)``, pure and jittable. The batch has rows [B, T, …], T > ``horizon``, and ``is_first``
      where another episode begins; see :func:`worldloom.models.tdmpc2.batch.prepare_batch`. Metrics are float32
      scalars: the loss terms, gradient norms before clipping, policy statistics, learning rate.
    """
    parts = training.microbatches

    def update(state: TrainState, batch: Batch, key: jax.Array | None) -> tuple[TrainState, dict[str, jax.Array]]:
        model_keys, policy_keys = (part_keys(each, parts) for each in split_key(key, 2))
        rows = prepare_batch(config, batch)
        task = rows.task
        params = _project_tasks(state.params, task)
        rows, tasks = split_rows((rows, task), parts)
        rebuild = lambda trained: merge(model_class, config, {**params, **trained})  # noqa: E731

        # 1. Encoder, dynamics, reward, Q networks, termination, task embedding.
        def model_gradients(inputs: tuple[TrainBatch, jax.Array | None]) -> Any:
            def objective(trained: Params) -> Any:
                out = rebuild(trained).model_loss(*inputs, remat=training.remat)
                return out.total, (out.terms, out.rollouts)

            (loss, (terms, rollouts)), grads = jax.value_and_grad(objective, has_aux=True)(
                _model_part(model_class, params)
            )
            return (grads, {"loss": loss, **terms}), rollouts

        (grads, terms), rollouts = accumulate(model_gradients, (rows, model_keys))
        # The policy's last backward pass is still in the embedding's gradient, as in the reference: there the policy's
        # optimizer clears only the policy's own gradients, and the model's are cleared before that pass, not after.
        leftover = state.opt_state["policy_grad_of_tasks"]
        grads |= jax.tree.map(jnp.add, _tasks(grads), leftover)
        grads = freeze_constants(model_class, config, grads)
        optimizer, before = _model_optimizer(config, training), _model_part(model_class, params)
        steps, model_opt = optimizer.update(grads, state.opt_state["model"], before)
        params |= optax.apply_updates(before, steps)
        params = _project_tasks(params, task)

        # 2. Policy prior. Values are divided by their width over the whole batch: microbatches need it beforehand.
        scale = None
        if parts > 1:
            values = accumulate(
                lambda inputs: ((), first_values(rebuild({}), *inputs)), (rollouts, tasks, policy_keys)
            )[1]
            scale = update_scale(params["scale"]["value"], values, config.tau)

        def policy_gradients(inputs: tuple[Rollouts, jax.Array | None, jax.Array | None]) -> Any:
            def objective(trained: Params) -> Any:
                return rebuild(trained).policy_loss(*inputs, scale=scale, remat=training.remat)

            trained = {"policy": params["policy"], **_added_parts(model_class, params), **_tasks(params)}
            (policy, metrics), grads = jax.value_and_grad(objective, has_aux=True)(trained)
            return (grads, {"policy": policy, **metrics}), ()

        (pi_grads, pi_metrics), _ = accumulate(policy_gradients, (rollouts, tasks, policy_keys))
        pi_grads = freeze_constants(model_class, config, pi_grads)
        optimizer, before = _policy_optimizer(config, training), _policy_part(model_class, params)
        of_policy = _policy_part(model_class, pi_grads)
        steps, policy_opt = optimizer.update(of_policy, state.opt_state["policy"], before)
        after = optax.apply_updates(before, steps)
        params |= after
        params["scale"] = {"value": pi_metrics["pi_scale"]}

        if config.explore == "disagreement":
            weight, updates = config.explore_weight, config.explore_updates
            params["explorer"] = advance(params["explorer"], terms["explore_spread"], weight=weight, updates=updates)
            terms["explore_weight"] = params["explorer"]["weight"]

        # 3. Target networks.
        params["target_q"] = optax.incremental_update(params["q"], params["target_q"], config.tau)

        of_policy_step = {
            "grad_norm": optax.tree.norm(grads),
            "pi_grad_norm": optax.tree.norm(of_policy),
            **pi_metrics,
            "lr": learning_rate_schedule(training)(state.step),
        }
        terms = with_f1(terms)
        check_new_metrics(of_policy_step, terms)
        metrics = terms | of_policy_step
        opt_state = {"model": model_opt, "policy": policy_opt, "policy_grad_of_tasks": _tasks(pi_grads)}
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return update


def eval_policy(
    model: TDMPC2WorldModel, carry: jax.Array | None, obs: Any, key: jax.Array | None, *, is_first: Any = None
) -> tuple[jax.Array, jax.Array]:
    """The policy as scores are measured: it still draws among the elites, but adds no exploration noise."""
    return model.act(carry, obs, key, is_first=is_first, explore=False)


def initial_carry(config: TDMPC2Config, num_envs: int) -> jax.Array:
    """The policy's carry before the first step: previous means of zero, [num_envs, H, A]."""
    return jnp.zeros((num_envs, config.horizon, config.action_dim), jnp.float32)


def replay_spec(config: TDMPC2Config, training: Any) -> ReplaySpec:
    """Rows per window: ``sequence_length``, at least ``horizon`` + 1, which is the published update.

    Windows lie within one episode, as in the reference, unless episodes terminate: then they run over the end, so that
    rollouts start in an episode's last rows too. As in the reference, an episode is replayed once it is over.
    """
    rows = max(training.sequence_length, config.horizon + 1)
    return ReplaySpec(rows=rows, cross_episodes=config.episodic, latents={}, open_episodes=False)


def validate_data(config: TDMPC2Config, *, has_terminals: bool, online: bool) -> None:
    """Terminal rows need a model that learns terminations, as in the reference; many tasks need recorded episodes.

    Raises:
      DataError: recorded rows are terminal, and the config is not ``episodic``.
      ConfigError: the same of environments, or a multitask model is to be trained in an environment.
    """
    if online and config.multitask:
        raise ConfigError("A multitask model is trained from recorded episodes of its tasks, not in one environment.")
    if not has_terminals or config.episodic:
        return
    if online:
        raise ConfigError(
            "An episode ended in a terminal state, but the model has episodic=False: it would value that state as "
            "if the episode went on. Create the model with episodic=True."
        )
    raise DataError(
        "The data holds terminal rows (is_terminal), and this TD-MPC2 model has episodic=False: it would plan on "
        "behind them. Build it with episodic=True; where an episode only ran into a time limit, its last row is "
        "is_last and not is_terminal."
    )


def _model_optimizer(config: TDMPC2Config, training: Any) -> optax.GradientTransformation:
    """Adam over all parts together; the encoder's learning rate is ``encoder_lr_scale`` times the others'."""
    return optax.chain(_adam(training, eps=1e-8), _scale_part("encoder", config.encoder_lr_scale))


def _policy_optimizer(config: TDMPC2Config, training: Any) -> optax.GradientTransformation:
    return _adam(training, eps=config.pi_adam_eps)


def _adam(training: Any, *, eps: float) -> optax.GradientTransformation:
    return optax.chain(
        clip_by_norm(training.grad_clip),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=eps),
        decay_kernels(training.weight_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(training)),
    )


def _scale_part(name: str, factor: float) -> optax.GradientTransformation:
    return optax.stateless(lambda steps, _: {**steps, name: jax.tree.map(lambda step: factor * step, steps[name])})


def _model_part(cls: type[Any], params: Params) -> Params:
    """What the model's optimizer moves: everything but the policy and the parts that no gradient reaches."""
    return {name: part for name, part in params.items() if name != "policy" and name not in cls.untrained}


def _added_parts(cls: type[Any], params: Params) -> Params:
    """Trained parts that a subclass has beside the family's own; they learn from both losses, in a step of each."""
    return {name: part for name, part in params.items() if name not in _OWN_PARTS and name not in cls.untrained}


def _policy_part(cls: type[Any], params: Params) -> Params:
    """What the policy's optimizer moves: the policy and the parts added."""
    return {"policy": params["policy"], **_added_parts(cls, params)}


def _tasks(params: Params) -> Params:
    return {name: part for name, part in params.items() if name == "task_embedding"}


def _project_tasks(params: Params, task: jax.Array | None) -> Params:
    """A copy of ``params`` in which the embeddings of ``task`` have norm at most 1."""
    if task is None:
        return dict(params)
    return {**params, "task_embedding": {"table": project_rows(params["task_embedding"]["table"], task)}}
