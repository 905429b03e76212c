"""Replay as arrays: rows are added, drawn and rewritten within a compiled program.

It holds the same rows under the same numbers as a ``ReplayBuffer`` to which N environments add one row each per step,
and draws the same windows: row ``i`` is of stream ``i % N``, at position ``i // N`` in it, so that no index is needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldloom.replay.index import FIRST, LAST, TERMINAL
from worldloom.replay.sampling import uniform

Array = Any
"""An array on the device, or one of NumPy where the host fills it."""


class RingSpec(NamedTuple):
    """What a ring is, static.

    Attributes:
      slots: rows that there is memory for; row ``i`` is in slot ``i % slots``.
      capacity: newest rows held, at most ``slots``.
      num_envs: N.
      batch_size: windows per batch, B.
      rows: rows per window, T.
      cross_episodes, open_episodes, fresh_first: see :class:`worldloom.algorithm.ReplaySpec`.
    """

    slots: int
    capacity: int
    num_envs: int
    batch_size: int
    rows: int
    cross_episodes: bool
    open_episodes: bool
    fresh_first: bool

    @property
    def listed(self) -> int:
        """Finished episodes per stream that there is memory for: those as long as a window."""
        return 1 if self.cross_episodes else self.slots // self.num_envs // self.rows + 2


class Episodes(NamedTuple):
    """The episodes of each stream.

    Attributes:
      current: position of the newest episode's first row, int32 [N].
      open: whether it is in progress, bool [N].
      begin, length: of the finished episodes that are as long as a window, int32 [N, listed], in a ring.
      head, tail: the entries ``head … tail - 1`` of it hold windows, int32 [N].
    """

    current: Array
    open: Array
    begin: Array
    length: Array
    head: Array
    tail: Array


class Ring(NamedTuple):
    """The rows.

    Attributes:
      obs: [slots, ...], or a dict of such arrays.
      actions: float32 [slots, A]; discrete ones as one-hots, zeros where no action was chosen.
      rewards: float32 [slots].
      flags: uint8 [slots], the bits of :mod:`worldloom.replay.index`.
      info: float32 [slots] by name.
      latents: float32 or bfloat16 [slots, ...] by name; what is written is rounded to it.
      episodes: see :class:`Episodes`.
      end: number of the next row, int32 [].
      oldest: rows numbered below are not held, whatever the capacity, int32 [].
      drawn: newest row whose window was replayed as fresh, int32 []; −1 for none.
    """

    obs: Any
    actions: Array
    rewards: Array
    flags: Array
    info: dict[str, Array]
    latents: dict[str, Array]
    episodes: Episodes
    end: Array
    oldest: Array
    drawn: Array


COLUMNS = ("obs", "actions", "rewards", "flags", "info", "latents")
"""Fields of :class:`Ring` with a row in each slot."""


def empty_ring(spec: RingSpec, row: dict[str, Any]) -> Ring:
    """A ring without rows; ``row`` has the shapes and dtypes of one, for each of :data:`COLUMNS`."""
    columns = jax.tree.map(lambda leaf: jnp.zeros((spec.slots, *leaf.shape), leaf.dtype), row)
    none = jnp.zeros(spec.num_envs, jnp.int32)
    listed = jnp.zeros((spec.num_envs, spec.listed), jnp.int32)
    zero = jnp.zeros((), jnp.int32)
    return Ring(
        **columns, episodes=Episodes(none, none > 0, listed, listed, none, none), end=zero, oldest=zero, drawn=zero - 1
    )


def add_rows(spec: RingSpec, ring: Ring, row: dict[str, Any], enabled: Any = True) -> Ring:
    """Add a row of each environment, ``{column: [N, ...]}``; the oldest rows beyond the capacity are no longer held.

    Nothing is added unless ``enabled`` []; the large arrays are not copied for that.
    """
    slots = jnp.where(enabled, (ring.end + jnp.arange(spec.num_envs)) % spec.slots, spec.slots)
    put = lambda column, value: column.at[slots].set(value.astype(column.dtype), mode="drop")  # noqa: E731
    written = {name: jax.tree.map(put, getattr(ring, name), row[name]) for name in COLUMNS}
    position = ring.end // spec.num_envs
    ring = ring._replace(**written, end=ring.end + jnp.where(enabled, spec.num_envs, 0))
    noted = _note_rows(spec, ring, row["flags"], position)
    if enabled is True:
        return ring._replace(episodes=noted)
    return ring._replace(episodes=jax.tree.map(lambda new, old: jnp.where(enabled, new, old), noted, ring.episodes))


def _note_rows(spec: RingSpec, ring: Ring, flags: jax.Array, position: jax.Array) -> Episodes:
    """The episodes after the newest rows, at ``position`` of their streams, with ``flags`` [N]."""
    episodes = ring.episodes
    over = flags & LAST > 0
    current = jnp.where(flags & FIRST > 0, position, episodes.current)
    episodes = episodes._replace(current=current, open=~over)
    if spec.cross_episodes:
        return episodes
    # List the episodes that have ended, if they hold a window.
    length = position - current + 1
    listed = over & (length >= spec.rows)
    entry = jnp.where(listed, episodes.tail % spec.listed, spec.listed)
    stream = jnp.arange(spec.num_envs)
    episodes = episodes._replace(
        begin=episodes.begin.at[stream, entry].set(current, mode="drop"),
        length=episodes.length.at[stream, entry].set(length, mode="drop"),
        tail=episodes.tail + listed,
    )
    # Rows are evicted at the old end: the oldest episode may no longer hold a window.
    entry = episodes.head % spec.listed
    left = episodes.begin[stream, entry] + episodes.length[stream, entry] - _oldest_positions(spec, ring)
    gone = (episodes.head < episodes.tail) & (left < spec.rows)
    return episodes._replace(head=episodes.head + gone)


def first_row(spec: RingSpec, ring: Ring) -> jax.Array:
    """Number of the oldest row held."""
    return jnp.maximum(ring.oldest, ring.end - spec.capacity)


def _oldest_positions(spec: RingSpec, ring: Ring) -> jax.Array:
    """Position of the oldest row held of each stream, int32 [N]."""
    first = first_row(spec, ring)
    return (first + (jnp.arange(spec.num_envs) - first) % spec.num_envs) // spec.num_envs


# ---- drawing ----------------------------------------------------------------------------------------------------


def draw(spec: RingSpec, ring: Ring, uniforms: jax.Array) -> tuple[Ring, jax.Array, jax.Array]:
    """The row numbers that ``SequenceSampler.sample`` draws.

    Args:
      spec: of the ring.
      ring: the rows.
      uniforms: uint32 [2, 2, B], from :func:`uniforms_of`.

    Returns:
      The ring with its position among fresh rows, row numbers int32 [B, T], and whether there was any window, bool [].
    """
    ids, found = (_draw_anywhere if spec.cross_episodes else _draw_in_episodes)(spec, ring, uniforms)
    if spec.fresh_first:
        ring, ids = _fresh_first(spec, ring, ids)
    return ring, ids, found


def _draw_anywhere(spec: RingSpec, ring: Ring, uniforms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Uniform over all windows of a stream, whatever episodes they span."""
    oldest, end = _oldest_positions(spec, ring), ring.end // spec.num_envs
    starts = jnp.maximum(end - oldest - spec.rows + 1, 0) * jnp.ones(spec.num_envs, jnp.int32)
    if not spec.open_episodes:
        finished_end = jnp.where(ring.episodes.open, ring.episodes.current, end)
        finished = jnp.maximum(finished_end - oldest - spec.rows + 1, 0)
        starts = jnp.where(finished.any(), finished, starts)
    total = jnp.cumsum(starts)
    window = _scaled(uniforms[0], total[-1])
    stream = jnp.searchsorted(total, window, side="right")
    begin = oldest[stream] + window - (total - starts)[stream]
    return _row_ids(spec, begin, stream), total[-1] > 0


def _draw_in_episodes(spec: RingSpec, ring: Ring, uniforms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Uniform over the episodes that hold a window, then over the windows in it."""
    episodes, oldest, end = ring.episodes, _oldest_positions(spec, ring), ring.end // spec.num_envs
    finished = episodes.tail - episodes.head
    in_progress = episodes.open & (end - jnp.maximum(episodes.current, oldest) >= spec.rows)
    if not spec.open_episodes:
        in_progress = in_progress & (finished.sum() == 0)
    counts = finished + in_progress
    total = jnp.cumsum(counts)
    chosen = _scaled(uniforms[0], total[-1])
    stream = jnp.searchsorted(total, chosen, side="right")
    number = chosen - (total - counts)[stream]
    entry = (episodes.head[stream] + number) % spec.listed
    is_open = number >= finished[stream]
    begin = jnp.where(is_open, episodes.current[stream], episodes.begin[stream, entry])
    stop = jnp.where(is_open, end, begin + episodes.length[stream, entry])
    begin = jnp.maximum(begin, oldest[stream])
    begin = begin + _scaled(uniforms[1], stop - begin - spec.rows + 1)
    return _row_ids(spec, begin, stream), total[-1] > 0


def _fresh_first(spec: RingSpec, ring: Ring, ids: jax.Array) -> tuple[Ring, jax.Array]:
    """``ids`` [B, T] with the next windows of fresh rows in the first places, see ``OnlineQueue``."""
    rows, envs = spec.rows, spec.num_envs

    def complete(row: jax.Array) -> jax.Array:
        """Windows whose last row is numbered at most ``row``: they are numbered in the order of their last rows."""
        position, stream = row // envs, row % envs
        return position // rows * envs + jnp.where((position + 1) % rows == 0, stream + 1, 0)

    held = complete(first_row(spec, ring) + (rows - 1) * envs - 1)
    begin = jnp.maximum(complete(ring.drawn), held)
    count = jnp.clip(complete(ring.end - 1) - begin, 0, spec.batch_size)
    window = begin + jnp.arange(spec.batch_size)
    fresh = _row_ids(spec, window // envs * rows, window % envs)
    ids = jnp.where((jnp.arange(spec.batch_size) < count)[:, None], fresh, ids)
    return ring._replace(drawn=jnp.where(count > 0, ids[jnp.maximum(count - 1, 0), -1], ring.drawn)), ids


def _row_ids(spec: RingSpec, begin: jax.Array, stream: jax.Array) -> jax.Array:
    """Rows [B, T] of the windows that begin at the positions ``begin`` [B] of ``stream`` [B]."""
    return ((begin[:, None] + jnp.arange(spec.rows)) * spec.num_envs + stream[:, None]).astype(jnp.int32)


def uniforms_of(seed: int, update: int, batch_size: int) -> np.ndarray:
    """The numbers that ``ReplayBuffer.draw`` draws for an update, as their 53 bits: uint32 [2, (high, low), B]."""
    bits = (uniform(seed, update, (2, batch_size)) * 2.0**53).astype(np.uint64)
    return np.stack([bits >> np.uint64(32), bits & np.uint64(0xFFFFFFFF)], axis=1).astype(np.uint32)


def _scaled(uniforms: jax.Array, count: jax.Array) -> jax.Array:
    """``floor(u · count)`` as NumPy computes it in float64, int32 [B], without 64-bit numbers.

    Args:
      uniforms: u · 2^53, uint32 [(high, low), B].
      count: int32, below 2^31, [] or [B].
    """
    high, low = uniforms
    count = jnp.asarray(count).astype(jnp.uint32)
    low_carry, fraction_low = _product(low, count)
    high_carry, middle = _product(high, count)
    middle, carry = _sum(middle, low_carry)
    whole = middle >> 21 | (high_carry + carry) << 11
    # In float64 the product is rounded to 53 bits, and so, rarely, up to the next integer.
    lost = 32 - jax.lax.clz(whole)  # bits beyond them
    half = jnp.where(lost > 0, jnp.uint32(1) << (jnp.maximum(lost, 1) - 1), 0).astype(jnp.uint32)
    rounds_up = (middle & 0x1FFFFF == 0x1FFFFF) & (fraction_low >= 0 - half) & (half > 0)
    return (whole + rounds_up).astype(jnp.int32)


def _product(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """High and low word of the product of two uint32."""
    x_high, x_low, y_high, y_low = x >> 16, x & 0xFFFF, y >> 16, y & 0xFFFF
    low, carry = _sum(x_low * y_low, x_high * y_low << 16)
    low, carry_2 = _sum(low, x_low * y_high << 16)
    return x_high * y_high + (x_high * y_low >> 16) + (x_low * y_high >> 16) + carry + carry_2, low


def _sum(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of two uint32, and the carry."""
    total = x + y
    return total, (total < x).astype(jnp.uint32)


# ---- reading and rewriting rows -------------------------------------------------------------------------------------


def take(spec: RingSpec, ring: Ring, ids: jax.Array) -> dict[str, Any]:
    """The rows ``ids`` [B, T] as a batch, see ``ReplayBuffer.take``; with the latents of row 0 if there are any."""
    slots = ids % spec.slots
    flags = ring.flags[slots]
    batch = {
        "obs": jax.tree.map(lambda column: column[slots], ring.obs),
        "actions": ring.actions[slots],
        "rewards": ring.rewards[slots],
        "is_first": flags & FIRST > 0,
        "is_last": flags & LAST > 0,
        "is_terminal": flags & TERMINAL > 0,
    }
    context = {name: column[slots[:, 0]] for name, column in ring.latents.items()}
    return batch | ({"context": context} if context else {})


def write_latents(
    spec: RingSpec, ring: Ring, ids: jax.Array, latents: dict[str, jax.Array], enabled: jax.Array
) -> Ring:
    """Replace the latents of the rows ``ids`` [B, T] by ``latents`` {name: [B, T, ...]} if ``enabled`` [].

    Of a row that occurs twice the last occurrence counts; rows that are no longer held are skipped.
    """
    flat = ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    ordered = flat[order]
    newest = jnp.append(ordered[1:] != ordered[:-1], True)
    kept = newest & (ordered >= first_row(spec, ring)) & enabled
    slots = jnp.where(kept, ordered % spec.slots, spec.slots)
    rows = {name: value.reshape(-1, *value.shape[2:])[order] for name, value in latents.items()}
    written = {
        name: ring.latents[name].at[slots].set(value.astype(ring.latents[name].dtype), mode="drop")
        for name, value in rows.items()
    }
    return ring._replace(latents=ring.latents | written)
