"""The compiled update: the only place where training meets ``jax.jit``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from worldloom.replay.device import Ring, gather_rows
from worldloom.state import TrainState

Batch = dict[str, Any]
Update = Callable[[TrainState, Batch, jax.Array | None], tuple[TrainState, dict[str, Any]]]

REPLAY = "replay"
"""Metric name under which an update returns rows to be written back to replay, a dict of [B, T, ...] arrays."""
SKIPPED = "skipped"
"""Metric added with ``skip_nonfinite``: updates left out so far."""


class Guard(NamedTuple):
    """What the device remembers of non-finite updates: ``alive`` bool [] until the first, ``skipped`` int32 []."""

    alive: jax.Array
    skipped: jax.Array


class Outcome(NamedTuple):
    """What one call returns beside the state; entries from the number of updates on are padding.

    Attributes:
      rows: metrics, float32 [K, M], in the order of :meth:`CompiledUpdate.names`.
      fresh: rows for replay, a dict of [K, B, T, ...].
      good: whether the update was applied, bool [K].
    """

    rows: jax.Array
    fresh: dict[str, jax.Array]
    good: jax.Array


class CompiledUpdate:
    """Up to K updates in one compiled call that consumes (donates) the state it is given.

    Update n reads batch n and the key ``fold_in(state.key, n)``, where n is the number of updates done before it. The
    number of updates is an argument of one program, so that any distance to the next step at which the host looks
    costs no compilation and gives, bit for bit, what single calls give.

    An update whose loss terms or gradient norms are not all finite is not applied. Without ``skip_nonfinite`` neither
    is any later one: the state stays the last good one, however late the host notices.

    Args:
      update: the family's pure ``update``.
      loss_terms: the family's ``LOSS_TERMS``.
      skip_nonfinite: count such updates and go on.
      keep_fresh: return the rows for replay; without, they are not even stored.
      single: K is 1 and there is no loop. On CPUs XLA computes gradients of convolutions a hundred times slower inside
        of one; what it computes outside may be rounded differently.
    """

    def __init__(
        self, update: Update, loss_terms: tuple[str, ...], skip_nonfinite: bool, keep_fresh: bool, single: bool
    ):
        # Jitted by itself too: naming the metrics and compiling the loop then share one trace.
        self._update = jax.jit(update)
        self._terms = loss_terms
        self._skip, self._keep_fresh, self._single = skip_nonfinite, keep_fresh, single
        self._call = jax.jit(self._updates, donate_argnums=0)

    def names(self, state: TrainState, batches: Batch, ring: Ring | None = None) -> tuple[str, ...]:
        """Metric names in the order of ``Outcome.rows``: loss terms first, in the family's order."""
        metrics = dict(self._abstract(state, batches, ring))
        metrics.pop(REPLAY, None)
        wrong = {name: leaf.shape for name, leaf in metrics.items() if getattr(leaf, "shape", None) != ()}
        assert not wrong, f"metrics must be scalars, got shapes {wrong}"
        assert "loss" in metrics, f"metrics must hold 'loss', got {sorted(metrics)}"
        terms = [name for name in self._terms if name in metrics]
        names = (*terms, *sorted(metrics.keys() - set(terms)))
        return (*names, SKIPPED) if self._skip else names

    def guarded(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """Positions in ``names`` of what must stay finite: loss terms and gradient norms."""
        return tuple(i for i, name in enumerate(names) if name in self._terms or "grad_norm" in name)

    def fresh_guard(self, skipped: int = 0) -> Guard:
        """The guard of a run that has left out ``skipped`` updates so far."""
        return Guard(jnp.asarray(True), jnp.asarray(skipped, jnp.int32))

    def __call__(
        self, state: TrainState, guard: Guard, batches: Batch, count: int, ring: Ring | None = None
    ) -> tuple[TrainState, Guard, Outcome]:
        """Do ``count`` updates with the first ``count`` of ``batches`` [K, B, T, ...]. ``state`` is used up.

        With a ``ring`` (see :mod:`worldloom.replay.device`) observations and latents are looked up there.
        """
        assert count == 1 or not self._single
        return self._call(state, guard, batches, count, ring)

    def _abstract(self, state: TrainState, batches: Batch, ring: Ring | None) -> dict[str, Any]:
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batches)
        return jax.eval_shape(
            lambda *args: self._update(args[0], _complete(ring, args[1]), args[2]), state, batch, state.key
        )[1]

    def _updates(
        self, state: TrainState, guard: Guard, batches: Batch, count: jax.Array, ring: Ring | None
    ) -> tuple[TrainState, Guard, Outcome]:
        names = self.names(state, batches, ring)
        measured = names[:-1] if self._skip else names
        guarded = jnp.array(self.guarded(names))
        if jax.tree.leaves(batches)[0].shape[0] == 1 and not self._single:
            # XLA folds an axis of length one away, then fuses differently and rounds differently: give it two.
            batches = jax.tree.map(lambda x: jnp.concatenate([x, x]), batches)
        capacity = jax.tree.leaves(batches)[0].shape[0]
        fresh = self._abstract(state, batches, ring).get(REPLAY, {}) if self._keep_fresh else {}

        def one(index: jax.Array, carry: tuple[TrainState, Guard, Outcome]) -> tuple[TrainState, Guard, Outcome]:
            old, guard, outcome = carry
            # The barriers keep XLA from fusing the update with how its batch was stacked or its metrics are stored:
            # rounding must not depend on K.
            batch = _complete(ring, jax.tree.map(lambda x: x[index], batches))
            batch = jax.lax.optimization_barrier(batch)
            new, metrics = self._update(old, batch, jax.random.fold_in(old.key, old.step))
            metrics = jax.lax.optimization_barrier(metrics)
            row = jnp.stack([metrics[name].astype(jnp.float32) for name in measured])
            finite = jnp.isfinite(row[guarded]).all()
            if self._skip:
                skipped = guard.skipped + ~finite
                new = _choose(finite, new, old).replace(step=new.step)
                guard, row = guard._replace(skipped=skipped), jnp.append(row, skipped.astype(jnp.float32))
                good = finite
            else:
                good = guard.alive & finite
                new, guard = _choose(good, new, old), guard._replace(alive=good)
            returned = {name: outcome.fresh[name].at[index].set(metrics[REPLAY][name]) for name in outcome.fresh}
            return new, guard, Outcome(outcome.rows.at[index].set(row), returned, outcome.good.at[index].set(good))

        empty = Outcome(
            jnp.zeros((capacity, len(names)), jnp.float32),
            jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), fresh),
            jnp.zeros(capacity, bool),
        )
        if self._single:
            return one(jnp.zeros((), jnp.int32), (state, guard, empty))
        return jax.lax.fori_loop(0, count, one, (state, guard, empty))


@functools.lru_cache(maxsize=16)
def compiled_update(
    update: Update, loss_terms: tuple[str, ...], skip_nonfinite: bool, keep_fresh: bool, single: bool
) -> CompiledUpdate:
    """The :class:`CompiledUpdate` of these arguments; runs in one process share it and what it compiled."""
    return CompiledUpdate(update, loss_terms, skip_nonfinite, keep_fresh, single)


@jax.jit
def copy(tree: Any) -> Any:
    """New arrays with the same values: what the update may consume while others keep theirs."""
    return jax.tree.map(jnp.copy, tree)


def _complete(ring: Ring | None, batch: Batch) -> Batch:
    return gather_rows(ring, batch) if ring else batch


def _choose(condition: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    step, params, opt_state = jax.tree.map(
        lambda a, b: jnp.where(condition, a, b),
        (new.step, new.params, new.opt_state),
        (old.step, old.params, old.opt_state),
    )
    return new.replace(step=step, params=params, opt_state=opt_state)
