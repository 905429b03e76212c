"""The compiled update: the only place where training meets ``jax.jit``."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from worldloom.algorithm import LATENTS, Batch, MakeUpdate, TrainState, Update
from worldloom.config import check
from worldloom.replay.device import Ring, gather_rows
from worldloom.sharding import Placement
from worldloom.xla_workarounds import needs_unrolled_updates, pad_single_update

_log = logging.getLogger("worldloom")

SKIPPED = "skipped"
"""Metric added with ``skip_nonfinite``: number of updates skipped so far."""


class NonFiniteGuard(NamedTuple):
    """Record of non-finite updates, kept on the device.

    Attributes:
      alive: bool [], whether all updates so far were finite; not used with ``skip_nonfinite``.
      skipped: int32 [], number of updates skipped so far; only used with ``skip_nonfinite``.
    """

    alive: jax.Array
    skipped: jax.Array

    @classmethod
    def create(cls, skipped: int = 0) -> NonFiniteGuard:
        """The guard of a run that has skipped ``skipped`` updates so far."""
        return cls(jnp.asarray(True), jnp.asarray(skipped, jnp.int32))


class Learner(NamedTuple):
    """Everything that a compiled call changes on the device."""

    state: TrainState
    guard: NonFiniteGuard


class UpdateOutput(NamedTuple):
    """Results of one call other than the learner; entries from the number of updates on are padding.

    Attributes:
      metrics: float32 [K, M], in the order of :meth:`CompiledUpdate.metric_names`.
      latents: fresh latents for replay, by name [K, B, T, ...].
      applied: whether the update was applied, bool [K].
    """

    metrics: jax.Array
    latents: dict[str, jax.Array]
    applied: jax.Array


class CompiledUpdate:
    """Up to K updates in one compiled call; the state is donated.

    Update n reads batch n and the key ``fold_in(state.key, n)``, where n is the number of updates done before it. The
    number of updates in a call is a runtime argument: calls that end early for a callback need no recompilation and
    give, bit for bit, the results of single updates.

    An update whose loss terms or gradient norms are not all finite is not applied. Without ``skip_nonfinite``, later
    updates are not applied either: the state stays the last good one, however late the host reads the metrics.

    Args:
      update: the family's pure update.
      loss_terms: names of the loss terms among its metrics.
      skip_nonfinite: skip and count non-finite updates, and continue.
      keep_latents: return the fresh latents; if False, no memory is allocated for them.
      unrolled: K is 1 and there is no loop; see :func:`worldloom.xla_workarounds.needs_unrolled_updates`.
      placement: of the arrays; with a mesh, the update is divided over it. None is one device.
      latent_dtype: see ``TrainingConfig.latent_dtype``.
    """

    def __init__(
        self,
        update: Update,
        loss_terms: tuple[str, ...],
        skip_nonfinite: bool,
        keep_latents: bool,
        unrolled: bool,
        placement: Placement | None = None,
        latent_dtype: str = "float32",
    ):
        # The inner jit caches the trace, which metric_names and the loop then share.
        self._update = jax.jit(update if latent_dtype == "float32" else _with_rounded_latents(update))
        self._loss_terms = loss_terms
        self._skip_nonfinite, self._keep_latents, self._unrolled = skip_nonfinite, keep_latents, unrolled
        self._placement = placement if placement and placement.mesh else None
        self._call = None if self._placement else jax.jit(self._updates, donate_argnums=0)

    def metric_names(self, state: TrainState, batches: Batch, ring: Ring | None = None) -> tuple[str, ...]:
        """Metric names in the order of ``UpdateOutput.metrics``: loss terms first, in the family's order."""
        metrics = dict(self.abstract_metrics(state, batches, ring))
        metrics.pop(LATENTS, None)
        wrong = {name: leaf.shape for name, leaf in metrics.items() if getattr(leaf, "shape", None) != ()}
        check(not wrong, f"The metrics of an update must be scalars; these have shapes: {wrong}.")
        check("loss" in metrics, f"The metrics of an update must hold 'loss', the total; they hold {sorted(metrics)}.")
        missing = [name for name in self._loss_terms if name not in metrics]
        check(
            not missing,
            f"loss_terms names {', '.join(missing)}, which the update does not return; it returns "
            f"{', '.join(sorted(metrics))}. Only terms that it returns can be guarded against NaN.",
        )
        terms = list(self._loss_terms)
        names = (*terms, *sorted(metrics.keys() - set(terms)))
        return (*names, SKIPPED) if self._skip_nonfinite else names

    def guarded(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """Positions in ``names`` of the metrics that must be finite: loss terms and gradient norms."""
        return tuple(i for i, name in enumerate(names) if name in self._loss_terms or "grad_norm" in name)

    def __call__(
        self, learner: Learner, batches: Batch, count: int, ring: Ring | None = None
    ) -> tuple[Learner, UpdateOutput]:
        """Do ``count`` updates with the first ``count`` of ``batches`` [K, B, T, ...]; donates the learner's state.

        With a ``ring`` (see :mod:`worldloom.replay.device`), observations and latents are gathered from it.
        """
        assert count == 1 or not self._unrolled
        if self._call is None:
            self._call = self._divided(learner)
        with self._context():
            return self._call(*learner, batches, count, ring)

    def lower(self, learner: Learner, batches: Batch, count: int = 1) -> jax.stages.Lowered:
        """The program of a call, to be compiled and read."""
        call = self._call or self._divided(learner)
        with self._context():
            return call.lower(*learner, batches, count, None)

    def _context(self) -> contextlib.AbstractContextManager[Any]:
        return self._placement.context() if self._placement else contextlib.nullcontext()

    def _divided(self, learner: Learner) -> Any:
        """The call over a mesh: its state stays divided as it is given."""
        assert self._placement is not None
        whole = self._placement.replicated()
        # Every process writes all latents to its replay, so each needs those of the others.
        latents = whole if self._placement.spans_processes else self._placement.rows(1)
        learner = Learner(self._placement.weights(learner.state), NonFiniteGuard(whole, whole))  # type: ignore[arg-type]
        outputs = learner, UpdateOutput(whole, latents, whole)  # type: ignore[arg-type]
        return jax.jit(self._updates, donate_argnums=0, out_shardings=outputs)

    def apply(
        self, learner: Learner, batch: Batch, names: tuple[str, ...], *, enabled: Any = True
    ) -> tuple[Learner, jax.Array, dict[str, jax.Array], jax.Array]:
        """One update with ``batch`` [B, T, ...], in traced code; dropped unless ``enabled``.

        Returns:
          The learner, the metrics in the order of ``names`` [M], fresh latents by name [B, T, ...], and whether the
          update was applied, bool [].
        """
        old, guard = learner
        update_names = names[:-1] if self._skip_nonfinite else names
        # The barriers keep XLA from fusing the update with the indexing of its batch or the storing of its metrics:
        # rounding must not depend on K.
        batch = jax.lax.optimization_barrier(batch)
        new, metrics = self._update(old, batch, jax.random.fold_in(old.key, old.step))
        metrics = jax.lax.optimization_barrier(metrics)
        row = jnp.stack([metrics[name].astype(jnp.float32) for name in update_names])
        finite = jnp.isfinite(row[jnp.array(self.guarded(names))]).all()
        if self._skip_nonfinite:
            # Drop a non-finite update but count its step: the next one reads the next batch and key, and the learning
            # rate that belongs to them.
            skipped = guard.skipped + (~finite & enabled)
            counted = _select(enabled, new, old)
            new = _select(finite & enabled, new, old)
            new = new.replace(step=counted.step, opt_state=_with_schedules_of(counted.opt_state, new.opt_state))
            guard, row = guard._replace(skipped=skipped), jnp.append(row, skipped.astype(jnp.float32))
            applied = finite & enabled
        else:
            # Drop this update and all later ones: the step stays that of the last good update.
            applied = guard.alive & finite & enabled
            new, guard = _select(applied, new, old), guard._replace(alive=applied)
        return Learner(new, guard), row, metrics.get(LATENTS, {}) if self._keep_latents else {}, applied

    def abstract_metrics(self, state: TrainState, batches: Batch, ring: Ring | None = None) -> dict[str, Any]:
        """Shapes and dtypes of the metrics and latents of an update with a batch of ``batches`` [K, B, T, ...]."""
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batches)
        return jax.eval_shape(
            lambda *args: self._update(args[0], _gather(ring, args[1]), args[2]), state, batch, state.key
        )[1]

    def _updates(
        self, state: TrainState, guard: NonFiniteGuard, batches: Batch, count: jax.Array, ring: Ring | None
    ) -> tuple[Learner, UpdateOutput]:
        # Names and shapes of the results.
        names = self.metric_names(state, batches, ring)
        if not self._unrolled:
            batches = pad_single_update(batches)
        capacity = jax.tree.leaves(batches)[0].shape[0]
        latents = self.abstract_metrics(state, batches, ring).get(LATENTS, {}) if self._keep_latents else {}

        def one_update(
            index: jax.Array, carry: tuple[TrainState, NonFiniteGuard, UpdateOutput]
        ) -> tuple[TrainState, NonFiniteGuard, UpdateOutput]:
            old, guard, output = carry
            batch = _gather(ring, jax.tree.map(lambda x: x[index], batches))
            (new, guard), row, fresh, applied = self.apply(Learner(old, guard), batch, names)
            kept = {name: output.latents[name].at[index].set(fresh[name]) for name in output.latents}
            return (
                new,
                guard,
                UpdateOutput(output.metrics.at[index].set(row), kept, output.applied.at[index].set(applied)),
            )

        empty = UpdateOutput(
            jnp.zeros((capacity, len(names)), jnp.float32),
            jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), latents),
            jnp.zeros(capacity, bool),
        )
        if self._unrolled:
            state, guard, output = one_update(jnp.zeros((), jnp.int32), (state, guard, empty))
        else:
            state, guard, output = jax.lax.fori_loop(0, count, one_update, (state, guard, empty))
        return Learner(state, guard), output


def call_capacity(model: Any, config: Any, device: jax.Device) -> tuple[int, bool]:
    """K, the maximum number of updates per call, and whether there is no loop over them (then K is 1)."""
    # On a CPU, the overhead of a call is small compared with an update, and short calls react to Ctrl-C sooner.
    capacity = config.updates_per_call or (1 if device.platform == "cpu" else 8)
    if not needs_unrolled_updates(model, device):
        return capacity, False
    if capacity > 1:
        _log.warning(
            "updates_per_call=%d is reduced to 1: on a CPU, XLA computes gradients of convolutions a hundred times "
            "slower inside the loop over several updates.",
            capacity,
        )
    return 1, True


@functools.lru_cache(maxsize=16)
def compiled_update(
    make_update: MakeUpdate,
    config: Any,
    training: Any,
    model_class: type[Any],
    loss_terms: tuple[str, ...],
    skip_nonfinite: bool,
    keep_latents: bool,
    unrolled: bool,
    version: Any,
    placement: Placement | None = None,
) -> CompiledUpdate:
    """The :class:`CompiledUpdate` of these arguments, cached: runs in one process share its compiled programs.

    ``version`` is ``model_class.version()``: a class that has changed since is compiled anew.
    ``training`` is ``TrainingConfig.of_update()``, the part of the config that an update reads.
    """
    update = make_update(config, training, model_class=model_class)
    return CompiledUpdate(update, loss_terms, skip_nonfinite, keep_latents, unrolled, placement, training.latent_dtype)


def _with_rounded_latents(update: Update) -> Update:
    """``update`` that reads stored latents, float32 or bfloat16, as float32 numbers rounded to bfloat16.

    They are rounded here too, though a device keeps them rounded: so results do not depend on where replay is kept.
    """

    def rounded(state: TrainState, batch: Batch, key: jax.Array | None) -> tuple[TrainState, dict[str, Any]]:
        if "context" not in batch:  # recorded data without latents
            return update(state, batch, key)
        # Not two casts, which XLA may leave out as excess precision.
        bfloat16 = functools.partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
        context = jax.tree.map(lambda x: bfloat16(x.astype(jnp.float32)), batch["context"])
        return update(state, {**batch, "context": context}, key)

    return rounded


@jax.jit
def copy(tree: Any) -> Any:
    """New arrays with the same values, such as a state that an update may donate."""
    return jax.tree.map(jnp.copy, tree)


def _gather(ring: Ring | None, batch: Batch) -> Batch:
    """``batch`` with the rows that its slots refer to, if rows are on the device."""
    return gather_rows(ring, dict(batch)) if ring else batch


def _with_schedules_of(counted: Any, opt_state: Any) -> Any:
    """``opt_state`` with the counts of learning rates, Optax's ``ScaleByScheduleState``, of ``counted``."""
    is_schedule = lambda part: isinstance(part, optax.ScaleByScheduleState)  # noqa: E731
    return jax.tree.map(lambda a, b: a if is_schedule(a) else b, counted, opt_state, is_leaf=is_schedule)


def _select(condition: Any, new: TrainState, old: TrainState) -> TrainState:
    """``new`` where ``condition`` holds, else ``old``. The key never changes."""
    step, params, opt_state = jax.tree.map(
        lambda a, b: jnp.where(condition, a, b),
        (new.step, new.params, new.opt_state),
        (old.step, old.params, old.opt_state),
    )
    return new.replace(step=step, params=params, opt_state=opt_state)
