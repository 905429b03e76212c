"""The loop on the device: act, step, store, draw and update as pure functions, in one call of the host.

One member is one run: :class:`Loop` is written for one, and lifted over many by ``vmap`` (``members``), whom a mesh
divides over devices. It does what
:class:`~worldloom.training.collector.Collector` and :class:`~worldloom.training.batches.BatchSource` do on the host, in
the same order and with the same keys, so that rows, batches and draws are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from worldloom.envs.jax.batch import Arrival, advance
from worldloom.ops.seed_sequence import spawned_state
from worldloom.replay.index import FIRST, LAST, TERMINAL
from worldloom.replay.ring import Array, Ring, RingSpec, add_rows, draw, take, write_latents
from worldloom.training.on_device.members import MEMBERS
from worldloom.training.update_loop import CompiledUpdate, Learner

FINE, BAD_STEP, BAD_ACTION, NO_WINDOW = range(4)
"""Values of ``Actor.trouble``."""


class Actor(NamedTuple):
    """What steps the environments, between two steps.

    Attributes:
      entropy: seed of the environments as ``ops.seed_sequence`` takes it, uint32 [4].
      envs: the environments.
      now: the newest row of each, which is not in replay yet.
      is_first: whether it begins an episode, bool [N].
      episodes: number of each environment's episode, int32 [N].
      carry: of the policy.
      actions: chosen at ``now``, as they will be executed: float32 [N, A] in [−1, 1], or int32 [N].
      latents: to be stored with ``now``.
      calls: steps of all environments so far, int32 [].
      decisions: decision steps so far, summed over the environments, int32 [].
      trouble: what has stopped the loop, int32 [].
    """

    entropy: Array
    envs: Any
    now: Arrival
    is_first: Array
    episodes: Array
    carry: Any
    actions: Array
    latents: dict[str, Array]
    calls: Array
    decisions: Array
    trouble: Array


class WaitingLatents(NamedTuple):
    """Fresh latents that are not in replay yet: those of update n are in place n mod 2K, see ``LatentWriteback``.

    Attributes:
      ids: rows, int32 [2K, B, T].
      latents: {name: [2K, B, T, ...]}.
      applied: whether the update was applied, bool [2K]; False where there is nothing.
    """

    ids: Array
    latents: dict[str, Array]
    applied: Array


class LoopState(NamedTuple):
    """Everything that the loop changes beside the learner."""

    actor: Actor
    ring: Ring
    waiting: WaitingLatents


class Chunk(NamedTuple):
    """What the host decides before a call of up to U updates.

    Attributes:
      first: updates done before, int32 [].
      count: updates to do, int32 [].
      due: decision steps at which each is due, int32 [U].
      uniforms: of each draw, uint32 [U, 2, 2, B].
    """

    first: Array
    count: Array
    due: Array
    uniforms: Array


class ChunkOutput(NamedTuple):
    """``metrics`` float32 [U, M], ``applied`` bool [U], and the rows ``ids`` of each batch, int32 [U, B, T]."""

    metrics: Array
    applied: Array
    ids: Array


class Loop:
    """The compiled calls of a run; :mod:`worldloom.training.on_device.fit` makes them one after the other.

    Args:
      env: the environment, see :class:`worldloom.envs.jax.JaxEnv`.
      limit: decision steps after which an episode is truncated, or None.
      ring: what replay is.
      act: the compiled policy, see ``collector.compiled_policy``.
      update: the compiled update; a function of one member's settings that returns it, with ``members``.
      names: names of its metrics.
      group: K, see ``LatentWriteback``.
      keeps_latents: whether updates write fresh latents back to replay.
      unrolled: a call does one update, without a loop around it; see ``xla_workarounds.needs_unrolled_updates``.
      members: whether all arrays have an axis of members first.
      mesh: devices that the members are divided over, see :mod:`worldloom.training.on_device.members`; None for one.
    """

    def __init__(
        self,
        env: Any,
        limit: int | None,
        ring: RingSpec,
        act: Callable[..., Any],
        update: CompiledUpdate | Callable[[Any], CompiledUpdate],
        names: tuple[str, ...],
        *,
        group: int,
        keeps_latents: bool,
        unrolled: bool,
        members: bool = False,
        mesh: Mesh | None = None,
    ):
        self.env, self.limit, self.ring = env, limit, ring
        self._act, self._update, self._names = act, update, names
        self._group, self._keeps_latents, self._unrolled, self._members = group, keeps_latents, unrolled, members
        self._mesh = mesh
        each, same = P(MEMBERS), P()
        chunk = Chunk(same, same, each, each)
        self.train = jax.jit(self._divided(self._train, each, each, chunk, each), donate_argnums=(0, 1))
        self.collect = jax.jit(self._divided(self._collect, each, each, each, same), donate_argnums=1)
        random = self._divided(self._collect_random, each, each, each, each, same)
        self.collect_random = jax.jit(random, donate_argnums=0)
        self.choose = jax.jit(self._divided(self._lift(self._choose), each, each))

    def _lift(self, function: Callable[..., Any], in_axes: Any = 0) -> Callable[..., Any]:
        return jax.vmap(function, in_axes) if self._members else function

    def _divided(self, function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
        """``function`` as every device of the mesh calls it for its own members.

        Members have nothing to tell each other. XLA, dividing the program by itself, would still let all devices ask
        in every step whether any member waits; so each goes through its loops alone.

        Args:
          function: of arrays of members, to such arrays.
          arguments: how each argument is divided.
        """
        if self._mesh is None:
            return function
        # Loops begin with constants, equal on all devices, and end with what is not: the check would refuse them.
        return jax.shard_map(function, mesh=self._mesh, in_specs=arguments, out_specs=P(MEMBERS), check_vma=False)

    # ---- one step ---------------------------------------------------------------------------------------------------

    def _execute(self, actor: Actor, ring: Ring, enabled: Any) -> tuple[Actor, Ring]:
        """Add the newest rows with their actions to replay, and step the environments."""
        now, over = actor.now, actor.now.is_last
        if self.env.action_type == "discrete":
            stored = jax.nn.one_hot(actor.actions, self.env.action_dim) * ~over[:, None]
        else:
            stored = jnp.where(over[:, None], 0.0, actor.actions)
        flags = actor.is_first * FIRST | over * LAST | now.is_terminal * TERMINAL
        row = {"obs": now.obs, "actions": stored, "rewards": now.reward, "flags": flags.astype(jnp.uint8)}
        ring = add_rows(self.ring, ring, row | {"info": now.info, "latents": actor.latents}, enabled)
        episodes = actor.episodes + over
        seeds = spawned_state(actor.entropy, jnp.arange(len(over)), episodes)[0] >> 1
        envs, arrival = advance(self.env, self.limit, actor.envs, actor.actions, over, seeds)
        good = _finite((arrival.obs, arrival.reward))
        after = actor._replace(
            envs=envs,
            now=arrival,
            is_first=over,
            episodes=episodes,
            decisions=actor.decisions + (~over).sum(dtype=jnp.int32),
            calls=actor.calls + 1,
            trouble=jnp.where(good, actor.trouble, BAD_STEP),
        )
        return after, ring

    def _choose(self, learner: Learner, actor: Actor) -> Actor:
        """Choose actions for the newest rows with the policy."""
        state, obs = learner.state, actor.now.obs
        inputs = jax.lax.optimization_barrier((state.params, actor.carry, obs, actor.is_first))
        params, carry, obs, is_first = inputs
        carry, actions, latents = self._act(params, state.key, carry, obs, is_first, actor.calls)
        carry, actions, latents = jax.lax.optimization_barrier((carry, actions, latents))
        executed, good = executed_actions(self.env, actions, actor.now.is_last)
        trouble = jnp.where(good | (actor.trouble > FINE), actor.trouble, BAD_ACTION)
        return actor._replace(carry=carry, actions=executed, latents=latents, trouble=trouble)

    def _step(self, learner: Learner, actor: Actor, ring: Ring, due: jax.Array) -> tuple[Actor, Ring]:
        """Step the environments once, if fewer than ``due`` decision steps were taken."""
        enabled = _waiting(actor, due) if self._members else True
        stepped, ring = self._execute(actor, ring, enabled)
        stepped = self._choose(learner, stepped)
        return _select(enabled, stepped, actor), ring

    # ---- collecting -------------------------------------------------------------------------------------------------

    def _collect(self, learner: Learner, state: LoopState, due: jax.Array, most: jax.Array) -> LoopState:
        """Step the environments until ``due`` decision steps were taken, but at most ``most`` times."""
        return state._replace(**self._until(learner, state.actor, state.ring, due, most))

    def _until(self, learner: Learner, actor: Actor, ring: Ring, due: jax.Array, most: Any = None) -> dict[str, Any]:
        step = self._lift(self._step)

        def go_on(carry: tuple[Any, Actor, Ring]) -> jax.Array:
            done, actor, _ = carry
            waiting = jnp.any(_waiting(actor, due))
            return waiting if most is None else waiting & (done < most)

        def body(carry: tuple[Any, Actor, Ring]) -> tuple[Any, Actor, Ring]:
            done, actor, ring = carry
            return done + 1, *step(learner, actor, ring, due)

        _, actor, ring = jax.lax.while_loop(go_on, body, (jnp.zeros((), jnp.int32), actor, ring))
        return {"actor": actor, "ring": ring}

    def _collect_random(
        self, state: LoopState, actions: jax.Array, kept: jax.Array, due: jax.Array, most: jax.Array
    ) -> LoopState:
        """The same with given actions: those of step i are ``actions[i]``, or the last ones again where ``kept[i]``.

        Args:
          state: see :class:`LoopState`.
          actions: [S, N, ...].
          kept: bool [S, N].
          due: decision steps.
          most: at most S.
        """

        def one(actor: Actor, ring: Ring, due: jax.Array, actions: jax.Array, kept: jax.Array) -> tuple[Actor, Ring]:
            enabled = _waiting(actor, due) if self._members else True
            after, ring = self._execute(actor, ring, enabled)
            again = (kept & ~after.is_first).reshape(-1, *[1] * (actions.ndim - 1))
            over = after.now.is_last.reshape(again.shape)
            chosen = jnp.where(over, 0, jnp.where(again, actor.actions, actions))
            zeros = jax.tree.map(jnp.zeros_like, actor.latents)
            return _select(enabled, after._replace(actions=chosen, latents=zeros), actor), ring

        at = 1 if self._members else 0
        step = self._lift(one)

        def body(carry: tuple[jax.Array, Actor, Ring]) -> tuple[jax.Array, Actor, Ring]:
            done, actor, ring = carry
            chosen, again = (jax.lax.dynamic_index_in_dim(x, done, at, keepdims=False) for x in (actions, kept))
            return done + 1, *step(actor, ring, due, chosen, again)

        go_on = lambda carry: jnp.any(_waiting(carry[1], due)) & (carry[0] < most)  # noqa: E731
        start = (jnp.zeros((), jnp.int32), state.actor, state.ring)
        _, actor, ring = jax.lax.while_loop(go_on, body, start)
        return state._replace(actor=actor, ring=ring)

    # ---- training ---------------------------------------------------------------------------------------------------

    def _train(
        self, learner: Learner, state: LoopState, chunk: Chunk, settings: Any = None
    ) -> tuple[Learner, LoopState, ChunkOutput]:
        """Do ``chunk.count`` updates, and step the environments until each is due."""
        capacity = chunk.due.shape[-1]
        at = 1 if self._members else 0
        one = self._lift(self._one_update, (0, 0, 0, None, 0))

        def body(index: jax.Array, carry: tuple[Learner, LoopState, ChunkOutput]) -> tuple[Any, ...]:
            learner, state, output = carry
            due, uniforms = (
                jax.lax.dynamic_index_in_dim(x, index, at, keepdims=False) for x in (chunk.due, chunk.uniforms)
            )
            state = state._replace(**self._until(learner, state.actor, state.ring, due))
            learner, state, row = one(learner, state, uniforms, chunk.first + index, settings)
            place = lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, index, at)  # noqa: E731
            return learner, state, jax.tree.map(place, output, row)

        shapes = jax.eval_shape(one, learner, state, _at(chunk.uniforms, at), chunk.first, settings)[2]
        empty = jax.tree.map(lambda x: jnp.zeros((*x.shape[:at], capacity, *x.shape[at:]), x.dtype), shapes)
        if self._unrolled:
            return body(jnp.zeros((), jnp.int32), (learner, state, empty))
        return jax.lax.fori_loop(0, chunk.count, body, (learner, state, empty))

    def _one_update(
        self, learner: Learner, state: LoopState, uniforms: jax.Array, number: jax.Array, settings: Any
    ) -> tuple[Learner, LoopState, ChunkOutput]:
        """Update number ``number`` with the windows that it draws."""
        ring, waiting = state.ring, state.waiting
        if self._keeps_latents:
            ring = self._write_due(ring, waiting, number)
        ring, ids, found = draw(self.ring, ring, uniforms)
        actor = state.actor
        actor = actor._replace(trouble=jnp.where(found | (actor.trouble > FINE), actor.trouble, NO_WINDOW))
        fine = actor.trouble == FINE
        update = self._update if isinstance(self._update, CompiledUpdate) else self._update(settings)
        batch = take(self.ring, ring, ids)
        learner, row, latents, applied = update.apply(learner, batch, self._names, enabled=fine)
        if self._keeps_latents:
            place, length = number % (2 * self._group), next(iter(latents.values())).shape[1]
            waiting = WaitingLatents(
                waiting.ids.at[place].set(ids[:, -length:]),
                {name: waiting.latents[name].at[place].set(value) for name, value in latents.items()},
                waiting.applied.at[place].set(applied),
            )
        return learner, LoopState(actor, ring, waiting), ChunkOutput(row, applied, ids)

    def _write_due(self, ring: Ring, waiting: WaitingLatents, number: jax.Array) -> Ring:
        """Write the latents that batch ``number`` must see: those of the group before the previous one."""

        def write(i: Any, ring: Ring) -> Ring:
            place = (number + i) % (2 * self._group)
            latents = {name: value[place] for name, value in waiting.latents.items()}
            return write_latents(self.ring, ring, waiting.ids[place], latents, waiting.applied[place])

        if self._group == 1:
            return write(0, ring)
        return jax.lax.fori_loop(0, jnp.where(number % self._group == 0, self._group, 0), write, ring)


def executed_actions(env: Any, actions: jax.Array, over: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What ``VectorEnv.executed`` makes of ``actions``, 0 where ``over`` [N]; and whether they are finite, bool []."""
    if env.action_type == "discrete":
        classes = jnp.argmax(actions, -1) if actions.ndim == 2 else actions  # one-hots [N, n], or classes [N]
        return jnp.where(over, 0, classes.astype(jnp.int32)), jnp.asarray(True)
    chosen = jnp.where(over[:, None], 0.0, actions.astype(jnp.float32))
    return jnp.clip(chosen, -1.0, 1.0), _finite(chosen)


def _waiting(actor: Actor, due: jax.Array) -> jax.Array:
    """Whether more steps are needed until ``due`` decision steps, and nothing is wrong."""
    return (actor.decisions < due) & (actor.trouble == FINE)


def _select(enabled: Any, new: Any, old: Any) -> Any:
    """``new`` if ``enabled`` [], else ``old``."""
    return new if enabled is True else jax.tree.map(functools.partial(jnp.where, enabled), new, old)


def _finite(tree: Any) -> jax.Array:
    """Whether all numbers of all arrays are finite, bool []."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in floats])) if floats else jnp.asarray(True)


def _at(x: jax.Array, axis: int) -> Any:
    """Shape and dtype of ``x`` without an axis."""
    return jax.ShapeDtypeStruct((*x.shape[:axis], *x.shape[axis + 1 :]), x.dtype)
