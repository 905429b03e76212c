"""Episodes, rows and stored columns from outside, checked as a whole before anything of them is stored.

Single arrays are converted by :mod:`worldloom.replay.conversion`. Everything raises ``DataError``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from worldloom.config import check
from worldloom.errors import DataError
from worldloom.replay.conversion import (
    as_array,
    as_finite_floats,
    check_length,
    convert_actions,
    convert_bools,
    convert_continuous,
    convert_integers,
    convert_obs,
    convert_rewards,
    ends_in_terminal,
    infer_action,
    infer_obs_column,
    pack_flags,
)
from worldloom.replay.index import FIRST, INTERRUPTED, LAST, TERMINAL
from worldloom.replay.schema import CONTINUOUS, DISCRETE, FLOAT32, INT32, Action, Declared, Schema, column_name
from worldloom.replay.table import Column
from worldloom.spaces import ACTION, OBS, mapping_keys, named, unnamed

Arrays = dict[str, np.ndarray]

ARRIVAL, DEPARTURE = "arrival", "departure"
"""Layouts of episodes with as many observations as rewards: a reward is that of arriving at its row's observation, or
that of the action chosen there."""


@dataclasses.dataclass(frozen=True)
class ArrayGroup:
    """Observations or actions, as a flat dict of arrays.

    Attributes:
      arrays: {name: [N, ...]} with one common N.
      is_mapping: whether the caller gave a dict, and not a single array.
      prefix: ``"obs"`` or ``"actions"``, for column names and messages.
    """

    arrays: Arrays
    is_mapping: bool
    prefix: str

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def keys(self) -> list[str] | None:
        """Keys of the dict, or None for a single array."""
        return list(self.arrays) if self.is_mapping else None

    def column_name(self, key: str) -> str:
        """Name of the column of one of the arrays."""
        return column_name(self.prefix, key, self.is_mapping)


# ---- whole episodes and single steps ------------------------------------------------------------------------------


def validate_episode(
    schema: Schema | None,
    declared: Declared,
    obs: Any,
    actions: Any,
    rewards: Any,
    ends: tuple[Any, Any, Any],
    task: Any,
    layout: str | None,
    stream: int,
) -> tuple[Schema, Arrays]:
    """The columns of one episode in any layout of ``ReplayBuffer.add_episode``.

    Without ``schema``, that of the rows already held, it is inferred from this episode and from what was ``declared``.
    ``ends`` are dones, terminated and truncated; ``stream`` is the number of the stream that the rows are added to.

    Returns:
      The schema, with the number of discrete actions increased where it is not fixed, and {column: [rows, ...]}.
    """
    observations, chosen = array_group(obs, "obs"), array_group(actions, "actions")
    count, steps = len(observations), len(chosen)
    if count not in (steps, steps + 1):
        raise DataError(
            f"obs has {count} rows and actions {steps}; give one observation more than actions (Gymnasium layout) or "
            "equally many (rows, with a layout)."
        )
    if count < 2:
        raise DataError(f"The episode has {count} row(s); at least two observations, one step, are needed.")
    received = convert_rewards(rewards, steps)
    terminal = ends_in_terminal(*ends, steps=steps)
    if infer_layout(layout, count, received) == DEPARTURE and count == steps:
        # Nobody recorded where the last action led to: with it go its reward and what kind of end it was.
        chosen = dataclasses.replace(chosen, arrays={key: array[:-1] for key, array in chosen.arrays.items()})
        received, terminal, steps = received[:-1], False, steps - 1
    tasks = None if task is None else convert_integers(task, count, "task")
    first, last = np.arange(count) == 0, np.arange(count) == count - 1
    schema = schema or infer_schema(declared, observations, chosen, tasks is not None)
    # By the arrival rule, no action need be chosen at the last row; in Gymnasium's layout every action was taken.
    optional = last if count == steps else np.zeros(steps, bool)
    schema, columns = convert_columns(schema, observations, chosen, optional, tasks)
    if count == steps + 1:
        # Gymnasium's layout → rows: the first has no reward, the last no action.
        received = np.concatenate([np.zeros(1, FLOAT32), received])
        for key, name in schema.action_columns.items():
            no_action = -1 if schema.actions[key].kind == DISCRETE else 0
            columns[name] = np.pad(
                columns[name], [(0, 1)] + [(0, 0)] * (columns[name].ndim - 1), constant_values=no_action
            )
    columns |= {"rewards": received, "flags": pack_flags(first, last, last & terminal)}
    return schema, columns | {"stream": np.full(count, stream, INT32)}


def check_layout(layout: str | None) -> None:
    """Raise ``ConfigError`` unless ``layout`` is ``"arrival"``, ``"departure"`` or None."""
    check(layout in (None, ARRIVAL, DEPARTURE), f"layout must be '{ARRIVAL}' or '{DEPARTURE}', not {layout!r}.")


def infer_layout(layout: str | None, count: int, rewards: np.ndarray) -> str:
    """``"arrival"`` or ``"departure"``: which rows the ``rewards`` of an episode with ``count`` observations belong to.

    Raises ``DataError`` where the lengths contradict what was said, or leave it open.
    """
    check_layout(layout)
    if count == len(rewards) + 1:
        if layout == ARRIVAL:
            raise DataError(
                f"layout='arrival' needs as many rewards as observations, {count}, the first of them 0; there are "
                f"{len(rewards)}. One observation more than actions is read without a layout."
            )
        return DEPARTURE
    if layout is None and rewards[0] != 0:
        raise DataError(
            f"obs and rewards have {count} entries each, and the first reward is {rewards[0]:g}: say what it belongs "
            "to. layout='departure' if rewards[t] is that of actions[t], as in most recordings: the last step is then "
            "left out, because the observation after it is missing (give it as a further entry of obs, without layout, "
            "and nothing is lost). layout='arrival' if rewards[t] came with obs[t]."
        )
    return layout or ARRIVAL


def validate_step(
    schema: Schema | None,
    declared: Declared,
    obs: Any,
    actions: Any,
    rewards: Any,
    flags: tuple[Any, Any, Any],
    task: Any,
    streams: Any,
) -> tuple[Schema, Arrays]:
    """The columns of one row from each of N environments (see ``ReplayBuffer.add_rows``), and their schema.

    Without ``schema``, that of the rows already held, it is inferred from these rows and from what was ``declared``.
    ``flags`` are is_first, is_last and is_terminal. The earlier rows of the streams are not known here; the caller must
    check whether these may follow them.

    Returns:
      The schema, with the number of discrete actions increased where it is not fixed, and {column: [N, ...]}.
    """
    observations, chosen = array_group(obs, "obs"), array_group(actions, "actions")
    count = len(observations)
    check_length("actions", len(chosen), count)
    received = convert_rewards(rewards, count)
    names = ("is_first", "is_last", "is_terminal")
    first, last, terminal = (convert_bools(v, count, n) for n, v in zip(names, flags, strict=True))
    numbers = np.arange(count, dtype=INT32) if streams is None else convert_integers(streams, count, "streams")
    tasks = None if task is None else convert_integers(task, count, "task")
    _check_step(numbers, received, first, last, terminal)
    schema = schema or infer_schema(declared, observations, chosen, tasks is not None)
    schema, columns = convert_columns(schema, observations, chosen, last, tasks)
    return schema, columns | {"rewards": received, "flags": pack_flags(first, last, terminal), "stream": numbers}


def _check_step(
    streams: np.ndarray, rewards: np.ndarray, first: np.ndarray, last: np.ndarray, terminal: np.ndarray
) -> None:
    """Rewards and flags [N] that contradict each other raise ``DataError`` naming the stream."""

    def refuse(bad: np.ndarray, why: str) -> None:
        if bad.any():
            raise DataError(f"Stream {streams[np.argmax(bad)]} {why}")

    if len(set(streams.tolist())) != len(streams):
        raise DataError(f"streams repeats a number: {streams.tolist()}; one row per environment and call.")
    refuse(terminal & ~last, "has a row that is terminal but not last; set is_last as well.")
    refuse(first & last, "has an episode of one row; at least two observations, one step, are needed.")
    refuse(
        first & (rewards != 0),
        "got a reward other than 0 at an episode's first row; a reward belongs to the row it arrives with, that of an "
        "episode's last step to its last row.",
    )


# ---- observations and actions against the schema ------------------------------------------------------------------


def array_group(value: Any, prefix: str) -> ArrayGroup:
    """An array or dict of arrays, given as ``obs`` or ``actions``, as arrays [N, ...] with one common N."""
    is_mapping = isinstance(value, Mapping)
    if is_mapping and (not value or not all(isinstance(key, str) and key for key in value)):
        raise DataError(f"{prefix} is a dict with keys {list(value)!r}; it needs named entries, as in {{'image': …}}.")
    arrays = {
        key: as_array(entry, column_name(prefix, key, is_mapping))
        for key, entry in named(value, OBS if prefix == "obs" else ACTION).items()
    }
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"The entries of {prefix} have different lengths: {lengths}.")
    return ArrayGroup(arrays, is_mapping, prefix)


def check_keys(given: Collection[str] | None, expected: Collection[str] | None, what: str) -> None:
    """Both must be None, for a single array, or have the same keys, in any order."""

    def describe(keys: Collection[str] | None) -> str:
        return "one array" if keys is None else f"a dict of {', '.join(sorted(keys))}"

    if (given is None) != (expected is None) or set(given or ()) != set(expected or ()):
        raise DataError(f"{what} is {describe(given)}; here it must be {describe(expected)}.")


def infer_schema(declared: Declared, obs: ArrayGroup, actions: ArrayGroup, has_task: bool) -> Schema:
    """The schema of the first data to arrive, which must agree with what was declared."""
    columns = {key: infer_obs_column(array, obs.column_name(key)) for key, array in obs.arrays.items()}
    if declared.obs_shape is not None:
        check_keys(obs.keys, mapping_keys(declared.obs_shape), "obs")
        # In the declared order.
        columns = {key: Column(shape, columns[key].dtype) for key, shape in named(declared.obs_shape, OBS).items()}
    kinds, dims = declared.action_type, declared.action_dim
    if isinstance(kinds, dict):
        check_keys(actions.keys, mapping_keys(kinds), "actions")
    if dims is not None:
        check_keys(actions.keys, mapping_keys(dims), "actions")
    dims_by_key = {} if dims is None else named(dims, ACTION)

    def infer(key: str) -> Action:
        kind = kinds[key] if isinstance(kinds, dict) else kinds
        return infer_action(actions.arrays[key], kind, dims_by_key.get(key), actions.column_name(key))

    inferred = {key: infer(key) for key in dims_by_key or actions.arrays}
    return Schema(columns, inferred, has_task, obs.is_mapping, actions.is_mapping)


def convert_columns(
    schema: Schema, obs: ArrayGroup, actions: ArrayGroup, optional: np.ndarray, task: np.ndarray | None
) -> tuple[Schema, Arrays]:
    """Observations, actions and tasks as columns, and the schema with action sizes increased that are not fixed.

    Args:
      schema: what the rows must fit.
      obs: observations [N, ...].
      actions: actions [n, ...]; n is N, or N − 1 in Gymnasium's layout.
      optional: bool [n], True where no action need be chosen.
      task: int32 [N], or None.
    """
    check_keys(obs.keys, mapping_keys(schema.obs_shape), "obs")
    check_keys(actions.keys, mapping_keys(schema.action_dim), "actions")
    if (task is not None) != schema.has_task:
        raise DataError(f"The rows here have {'a' if schema.has_task else 'no'} task; give all episodes one, or none.")
    columns: Arrays = {}
    for key, name in schema.obs_columns.items():
        columns[name] = convert_obs(obs.arrays[key], schema.obs[key], name)
    widened: dict[str, Action] = {}
    for key, name in schema.action_columns.items():
        columns[name], widened[key] = convert_actions(actions.arrays[key], schema.actions[key], optional, name)
    if task is not None:
        columns["task"] = task
    return dataclasses.replace(schema, actions=widened), columns


def match_schema(schema: Schema | None, *, obs_shape: Any, action_dim: Any, action_type: Any) -> Schema:
    """Check that a model with these spaces can train on the rows; its action sizes replace those only inferred."""
    if schema is None:
        raise DataError("The buffer is empty; add episodes before training.")
    is_mapping = isinstance(obs_shape, Mapping)
    shapes = unnamed({key: tuple(size) for key, size in named(obs_shape, OBS).items()}, is_mapping)
    if shapes != schema.obs_shape:
        raise DataError(f"The observations held have shape {schema.obs_shape}; the model takes {shapes}.")
    check_keys(mapping_keys(schema.action_dim), mapping_keys(action_dim), "The held actions")
    actions, dims = dict(schema.actions), named(action_dim, ACTION)
    kinds = action_type if isinstance(action_type, Mapping) else dict.fromkeys(actions, action_type)
    for key, action in actions.items():
        kind = kinds.get(key) or action.kind
        if kind != action.kind or (dims[key] != action.dim and (action.fixed or dims[key] < action.dim)):
            raise DataError(f"The actions held are {action.dim} {action.kind}; the model takes {dims[key]} {kind}.")
        actions[key] = action._replace(dim=dims[key], fixed=True)
    return dataclasses.replace(schema, actions=actions)


# ---- latents ------------------------------------------------------------------------------------------------------


def convert_latents(latents: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], lead: tuple[int, ...]) -> Arrays:
    """Latents {name: [*lead, *shape]} as finite float32; ``shapes`` are those per row of all latents stored."""
    converted = {}
    for key, value in latents.items():
        if key not in shapes:
            raise DataError(f"There are no latents '{key}' here, only {sorted(shapes) or 'none at all'}.")
        array, expected = np.asarray(value), (*lead, *shapes[key])
        if array.shape != expected:
            raise DataError(f"latents '{key}' have shape {array.shape}; {expected} is needed.")
        converted[key] = as_finite_floats(array, f"latents '{key}'")
    return converted


# ---- rows read from a file ----------------------------------------------------------------------------------------


def check_stored_column(schema: Schema, name: str, values: np.ndarray) -> None:
    """A column [N, ...] read from a file must hold only what the functions above could have stored in it."""
    prefix, _, key = name.partition("/")
    if prefix == "obs" and values.dtype == FLOAT32:
        convert_obs(values, schema.obs[key or OBS], name)
    elif prefix == "actions" and schema.actions[key or ACTION].kind == CONTINUOUS:
        convert_continuous(values, schema.actions[key or ACTION], name)
    elif prefix == "actions":
        fixed = schema.actions[key or ACTION]._replace(fixed=True)
        convert_actions(values, fixed, np.ones(len(values), bool), name)
    elif prefix in ("rewards", "latents"):
        as_finite_floats(values, name)
    elif prefix == "flags" and ((values >= 2 * INTERRUPTED) | (values & (LAST | TERMINAL) == TERMINAL)).any():
        raise DataError("flags holds impossible combinations.")
    elif prefix in ("stream", "task") and values.min(initial=0) < (-1 if prefix == "stream" else 0):
        raise DataError(f"{name} holds a negative number.")


def check_episode_order(streams: np.ndarray, flags: np.ndarray) -> None:
    """In every stream, the row after an episode's last must be an episode's first: ``streams`` and ``flags`` [N]."""
    order = np.argsort(streams, kind="stable")
    streams, flags = streams[order], flags[order]
    ended = (streams[1:] == streams[:-1]) & (flags[:-1] & LAST != 0)
    if (ended & (flags[1:] & FIRST == 0)).any():
        raise DataError("An episode goes on after its last row.")
