"""The door: arrays from outside are checked and converted to columns here, before anything is stored.

Images (three axes) stay uint8 (0–255) or become float32 (0–1); other observations, continuous actions (in [−1, 1]) and
rewards become float32, discrete actions int32 indices. Everything raises ``DataError``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from worldloom.errors import DataError
from worldloom.replay.rows import Column
from worldloom.replay.schema import CONTINUOUS, DISCRETE, FLOAT32, INT32, UINT8, Action, Declared, Schema, column_name
from worldloom.replay.streams import CLOSED, FIRST, LAST, TERMINAL

Arrays = dict[str, np.ndarray]

TOLERANCE = 1e-6
"""How far beyond ±1 a continuous action, or beyond 0 and 1 a float image, may lie by rounding."""

MAX_INFERRED_ACTIONS = 4096
"""More discrete actions than this have to be declared with ``action_dim``."""


# ---- whole episodes and single steps ------------------------------------------------------------------------------


def episode(
    schema: Schema | None,
    declared: Declared,
    obs: Any,
    actions: Any,
    rewards: Any,
    ends: tuple[Any, Any, Any],
    task: Any,
    stream: int,
) -> tuple[Schema, Arrays]:
    """The columns of one episode in either layout (see ``ReplayBuffer.add_episode``), and the schema they fit.

    ``ends`` are dones, terminated and truncated.
    """
    observations, chosen = arrays(obs, "obs"), arrays(actions, "actions")
    count, steps = _length(observations), _length(chosen)
    if count not in (steps, steps + 1):
        raise DataError(
            f"obs has {count} rows and actions {steps}; give one observation more than actions (Gymnasium layout) or "
            "equally many (rows by the arrival rule)."
        )
    if count < 2:
        raise DataError(f"The episode has {count} row(s); at least two observations, one step, are needed.")
    received = convert_rewards(rewards, steps)
    terminal = ends_in_terminal(*ends, steps=steps)
    tasks = None if task is None else convert_integers(task, count, "task")
    first, last = np.arange(count) == 0, np.arange(count) == count - 1
    schema = schema or infer_schema(declared, observations, chosen, tasks is not None)
    # In rows, nothing need be chosen at the last one; in Gymnasium's layout every action was taken.
    idle = last if count == steps else np.zeros(steps, bool)
    schema, columns = convert(schema, observations, chosen, idle, tasks)
    if count == steps + 1:
        received = np.concatenate([np.zeros(1, FLOAT32), received])
        for key, action in schema.actions.items():
            name, nothing = column_name("actions", key), -1 if action.kind == DISCRETE else 0
            columns[name] = np.pad(
                columns[name], [(0, 1)] + [(0, 0)] * (columns[name].ndim - 1), constant_values=nothing
            )
    columns |= {"rewards": received, "flags": flag_bits(first, last, last & terminal)}
    return schema, columns | {"stream": np.full(count, stream, INT32)}


def step(
    schema: Schema | None,
    declared: Declared,
    obs: Any,
    actions: Any,
    rewards: Any,
    flags: tuple[Any, Any, Any],
    task: Any,
    streams: Any,
) -> tuple[Schema, Arrays]:
    """The columns of one row from each of N environments (see ``ReplayBuffer.add_rows``), and the schema they fit.

    ``flags`` are is_first, is_last and is_terminal. What went before in the streams is not known here.
    """
    observations, chosen = arrays(obs, "obs"), arrays(actions, "actions")
    count = _length(observations)
    check_length("actions", _length(chosen), count)
    received = convert_rewards(rewards, count)
    names = ("is_first", "is_last", "is_terminal")
    first, last, terminal = (convert_bools(v, count, n) for n, v in zip(names, flags, strict=True))
    places = np.arange(count, dtype=INT32) if streams is None else convert_integers(streams, count, "streams")
    tasks = None if task is None else convert_integers(task, count, "task")
    _check_step(places, received, first, last, terminal)
    schema = schema or infer_schema(declared, observations, chosen, tasks is not None)
    schema, columns = convert(schema, observations, chosen, last, tasks)
    return schema, columns | {"rewards": received, "flags": flag_bits(first, last, terminal), "stream": places}


def _check_step(
    streams: np.ndarray, rewards: np.ndarray, first: np.ndarray, last: np.ndarray, terminal: np.ndarray
) -> None:
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


# ---- the schema ---------------------------------------------------------------------------------------------------


def infer_schema(declared: Declared, obs: Arrays, actions: Arrays, has_task: bool) -> Schema:
    """The schema of the first data that arrive, which must agree with what was declared."""
    columns = {key: obs_column(array, column_name("obs", key)) for key, array in obs.items()}
    if declared.obs_shape is not None:
        same_keys(columns, declared.obs_shape, "obs")
        columns = {key: Column(shape, columns[key].dtype) for key, shape in declared.obs_shape.items()}
    kinds, dims = declared.action_type, declared.action_dim
    for said in (kinds, dims):
        if isinstance(said, dict):
            same_keys(actions, said, "actions")

    def infer(key: str) -> Action:
        kind = kinds[key] if isinstance(kinds, dict) else kinds
        return infer_action(actions[key], kind, dims[key] if dims else None, column_name("actions", key))

    return Schema(columns, {key: infer(key) for key in dims or actions}, has_task)


def same_keys(given: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Both must have the same keys, in any order."""

    def describe(keys: Mapping[str, Any]) -> str:
        return "one array" if "" in keys else f"a dict of {', '.join(sorted(keys))}"

    if set(given) != set(expected):
        raise DataError(f"{what} is {describe(given)}; here it must be {describe(expected)}.")


def convert(
    schema: Schema, obs: Arrays, actions: Arrays, idle: np.ndarray, task: np.ndarray | None
) -> tuple[Schema, Arrays]:
    """Observations, actions and tasks as columns, and the schema with open action sizes widened."""
    same_keys(obs, schema.obs, "obs")
    same_keys(actions, schema.actions, "actions")
    if (task is not None) != schema.has_task:
        raise DataError(f"The rows here have {'a' if schema.has_task else 'no'} task; give all episodes one, or none.")
    columns: Arrays = {}
    for key, column in schema.obs.items():
        name = column_name("obs", key)
        columns[name] = convert_obs(obs[key], column, name)
    widened: dict[str, Action] = {}
    for key, action in schema.actions.items():
        name = column_name("actions", key)
        columns[name], widened[key] = convert_actions(actions[key], action, idle, name)
    if task is not None:
        columns["task"] = task
    return dataclasses.replace(schema, actions=widened), columns


# ---- arrays -------------------------------------------------------------------------------------------------------


def arrays(value: Any, what: str) -> Arrays:
    """An array or dict of arrays as ``{key: [N, ...]}`` with one common N."""
    if isinstance(value, Mapping):
        if not value or not all(isinstance(key, str) and key for key in value):
            raise DataError(
                f"{what} is a dict with keys {list(value)!r}; it needs named entries, as in {{'image': …}}."
            )
        found = {key: as_array(entry, column_name(what, key)) for key, entry in value.items()}
    else:
        found = {"": as_array(value, what)}
    lengths = {key: len(array) for key, array in found.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"The entries of {what} have different lengths: {lengths}.")
    return found


def numbers(value: Any, what: str, kinds: str = "biuf") -> np.ndarray:
    """Anything array-like as an array of numbers of these NumPy kinds, of any rank."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{what} is not an array: {error}") from error
    if array.dtype.kind not in kinds:
        wanted = "integers" if kinds == "iu" else "numbers (uint8, int, float32 or float64)"
        raise DataError(f"{what} has dtype {array.dtype}; {wanted} are needed.")
    return array


def as_array(value: Any, what: str) -> np.ndarray:
    """A numeric array with at least one axis."""
    array = numbers(value, what)
    if array.ndim == 0:
        raise DataError(f"{what} is a single number; an array with one row per step is needed.")
    return array


def floats(array: np.ndarray, what: str) -> np.ndarray:
    """As finite float32."""
    with np.errstate(over="ignore"):
        converted = array.astype(FLOAT32)
    finite = np.isfinite(converted)
    if not finite.all():
        step = np.argwhere(~finite)[0][0]
        raise DataError(f"{what} holds NaN or infinite values (in float32), first at step {step}. Nothing was stored.")
    return converted


def check_length(what: str, length: int, expected: int) -> None:
    """Lengths must agree."""
    if length != expected:
        raise DataError(f"Lengths do not agree: {what} has {length} entries, {expected} are needed.")


def _length(found: Arrays) -> int:
    return len(next(iter(found.values())))


# ---- observations -------------------------------------------------------------------------------------------------


def obs_column(array: np.ndarray, what: str) -> Column:
    """How observations ``[N, *shape]`` are stored."""
    shape = array.shape[1:]
    if not shape or 0 in shape:
        raise DataError(f"{what} has shape {array.shape}; it needs a time axis and then the observation, as in [N, 4].")
    if len(shape) == 3 and array.dtype.kind != "f" and array.dtype != UINT8:
        raise DataError(f"{what} holds images of dtype {array.dtype}; give uint8 (0–255) or floats (0–1).")
    return Column(shape, UINT8 if len(shape) == 3 and array.dtype == UINT8 else FLOAT32)


def convert_obs(array: np.ndarray, column: Column, what: str) -> np.ndarray:
    """Observations as stored in ``column``, or a sentence why not."""
    if array.shape[1:] != column.shape:
        raise DataError(
            f"{what} has shape {array.shape}; observations here have shape {column.shape} after the time axis."
        )
    given = obs_column(array, what)
    if given.dtype != column.dtype:
        raise DataError(f"{what} has dtype {array.dtype}; the images here are stored as {column.dtype}, do not mix.")
    if column.dtype == UINT8:
        return array
    converted = floats(array, what)
    if len(column.shape) == 3:
        low, high = converted.min(initial=0.0), converted.max(initial=0.0)
        if low < -TOLERANCE or high > 1 + TOLERANCE:
            raise DataError(
                f"{what} holds float images from {low:g} to {high:g}; floats are 0–1. Divide by 255, or give uint8."
            )
    return converted


# ---- actions ------------------------------------------------------------------------------------------------------


def infer_action(array: np.ndarray, kind: str | None, dim: int | None, what: str) -> Action:
    """What actions ``[n]`` or ``[n, A]`` are, where the user has not said: integers are discrete, floats continuous."""
    kind = kind or (CONTINUOUS if array.dtype.kind == "f" else DISCRETE)
    if kind == DISCRETE and array.ndim == 1:
        return Action(DISCRETE, dim or 1, fixed=dim is not None)
    if array.ndim != 2 or array.shape[1] == 0:
        raise DataError(
            f"{what} has shape {array.shape}; continuous actions are [n, action_dim] (reshape a single one to [n, 1]), "
            "discrete ones integers [n] or one-hots [n, number of actions]."
        )
    return Action(kind, dim or array.shape[1])


def convert_actions(array: np.ndarray, action: Action, idle: np.ndarray, what: str) -> tuple[np.ndarray, Action]:
    """Actions as stored, and ``action`` with its size widened where that is still open.

    Args:
      array: [n] or [n, A].
      action: what they should be.
      idle: bool [n], True where no action need be chosen (an episode's last row): −1 or a zero vector is allowed there.
      what: name for messages.
    """
    if action.kind == CONTINUOUS:
        return _convert_continuous(array, action, what), action
    index = _indices(array, action, idle, what)
    if not action.fixed:
        # A stray number must not widen every batch; who really has so many actions can say so.
        action = action._replace(dim=max(action.dim, min(int(index.max(initial=0)) + 1, MAX_INFERRED_ACTIONS)))
    bad = (index >= action.dim) | (index < 0) & ~(idle & (index == -1))
    if bad.any():
        step = int(np.argmax(bad))
        if not action.fixed and index[step] >= 0:
            raise DataError(
                f"{what}[{step}] is {index[step]}; to have that many actions, say action_dim when creating."
            )
        if not action.fixed:
            raise DataError(f"{what}[{step}] is {index[step]}; discrete actions count from 0.")
        raise DataError(
            f"{what}[{step}] is {index[step]}; with {action.dim} discrete actions it must lie in 0 … {action.dim - 1}."
        )
    return index.astype(INT32), action


def _convert_continuous(array: np.ndarray, action: Action, what: str) -> np.ndarray:
    if array.shape[1:] != (action.dim,):
        raise DataError(f"{what} has shape {array.shape}; continuous actions here are [n, {action.dim}].")
    converted = floats(array, what)
    bad = np.abs(converted) > 1 + TOLERANCE
    if bad.any():
        step, entry = np.argwhere(bad)[0]
        raise DataError(
            f"{what}[{step}, {entry}] is {converted[step, entry]:g}; continuous actions lie in [-1, 1]. Scale them: "
            "2 * (action - low) / (high - low) - 1, with the environment's bounds."
        )
    return converted


def _indices(array: np.ndarray, action: Action, idle: np.ndarray, what: str) -> np.ndarray:
    """Integers [n] from integers [n] or one-hots [n, A]; a zero vector where ``idle`` becomes −1."""
    if array.ndim == 1 and array.dtype.kind in "iu":
        return array.astype(np.int64)
    if array.ndim == 1 or array.shape[1:] != (action.dim,):
        raise DataError(
            f"{what} has shape {array.shape} and dtype {array.dtype}; discrete actions are integers [n] or one-hots "
            f"[n, {action.dim}]."
        )
    ones = (array == 1).sum(axis=1)
    valid = ((array == 0) | (array == 1)).all(axis=1) & ((ones == 1) | idle & (ones == 0))
    if not valid.all():
        step = int(np.argmin(valid))
        raise DataError(
            f"{what}[{step}] is {array[step].tolist()}: not a one-hot vector. Continuous? Say action_type='continuous'."
        )
    return np.where(ones == 1, array.argmax(axis=1), -1)


# ---- rewards, flags and tasks -------------------------------------------------------------------------------------


def convert_rewards(value: Any, count: int) -> np.ndarray:
    """Rewards as float32 [count]."""
    array = as_array(value, "rewards")
    if array.ndim != 1:
        raise DataError(f"rewards has shape {array.shape}; one number per step, [n], is needed.")
    check_length("rewards", len(array), count)
    return floats(array, "rewards")


def convert_bools(value: Any, count: int, what: str) -> np.ndarray:
    """Per-step booleans [count] from bools or from numbers that are 0 or 1."""
    array = as_array(value, what)
    if array.ndim != 1:
        raise DataError(f"{what} has shape {array.shape}; one boolean per step, [n], is needed.")
    check_length(what, len(array), count)
    other = (array != 0) & (array != 1)
    if other.any():
        raise DataError(f"{what} holds {array[other][0]}; booleans (or 0 and 1) are needed.")
    return array.astype(bool)


def convert_integers(value: Any, count: int, what: str) -> np.ndarray:
    """Integers ≥ 0 as int32 [count] from one integer or [count]."""
    array = numbers(value, what, "iu")
    if array.shape not in ((), (count,)):
        raise DataError(f"{what} has shape {array.shape}; one integer, or {count} of them, is needed.")
    if array.size and not (array.min() >= 0 and array.max() <= np.iinfo(np.int32).max):
        raise DataError(f"{what} must lie in 0 … {np.iinfo(np.int32).max}, not {array.min()} … {array.max()}.")
    return np.broadcast_to(array.astype(INT32), (count,))


def ends_in_terminal(dones: Any, terminated: Any, truncated: Any, *, steps: int) -> bool:
    """Whether an episode of ``steps`` flagged steps ended in a terminal state.

    Each argument is None, a scalar that speaks of the last step, or one value per step [steps].
    """
    given = {"dones": dones, "terminated": terminated, "truncated": truncated}
    flags = {name: _last_step(value, steps, name) for name, value in given.items() if value is not None}
    done, terminal, timeout = flags.get("dones"), flags.get("terminated"), flags.get("truncated")
    if terminal is None:
        # Older Gym: one flag for both ends, with the time limit told apart beside it if at all.
        terminal = bool(done) and not timeout
    ended = bool(terminal or timeout)
    contradiction = done is not None and ((ended and not done) or (done and not ended and timeout is not None))
    if contradiction:
        raise DataError(
            f"dones says {done} at the last step, terminated {terminal} and truncated {timeout}; dones is their 'or'. "
            "Give terminated and truncated alone."
        )
    return terminal


def _last_step(value: Any, steps: int, what: str) -> bool:
    array = numbers(value, what)
    flags = convert_bools(array[None] if array.ndim == 0 else array, 1 if array.ndim == 0 else steps, what)
    if flags[:-1].any():
        raise DataError(
            f"{what} is True at step {int(np.argmax(flags))} of {steps}, in the middle of the episode. Split "
            "there, and add each episode by itself."
        )
    return bool(flags[-1])


def flag_bits(is_first: Any, is_last: Any, is_terminal: Any) -> np.ndarray:
    """The ``flags`` column from boolean arrays [N]."""
    return (is_first * np.uint8(FIRST) | is_last * np.uint8(LAST) | is_terminal * np.uint8(TERMINAL)).astype(UINT8)


# ---- rows read from a file ----------------------------------------------------------------------------------------


def check_stored(schema: Schema, name: str, values: np.ndarray) -> None:
    """A column as read back must hold what the functions above could have stored in it."""
    prefix, _, key = name.partition("/")
    if prefix == "obs" and values.dtype == FLOAT32:
        convert_obs(values, schema.obs[key], name)
    elif prefix == "actions" and schema.actions[key].kind == CONTINUOUS:
        _convert_continuous(values, schema.actions[key], name)
    elif prefix == "actions":
        convert_actions(values, schema.actions[key]._replace(fixed=True), np.ones(len(values), bool), name)
    elif prefix in ("rewards", "latents"):
        floats(values, name)
    elif prefix == "flags" and ((values >= 2 * CLOSED) | (values & (LAST | TERMINAL) == TERMINAL)).any():
        raise DataError("flags holds impossible combinations.")
    elif prefix in ("stream", "task") and values.min(initial=0) < (-1 if prefix == "stream" else 0):
        raise DataError(f"{name} holds a negative number.")


def check_order(streams: np.ndarray, flags: np.ndarray) -> None:
    """In every stream the row after an episode's last must be an episode's first."""
    order = np.argsort(streams, kind="stable")
    streams, flags = streams[order], flags[order]
    ended = (streams[1:] == streams[:-1]) & (flags[:-1] & LAST != 0)
    if (ended & (flags[1:] & FIRST == 0)).any():
        raise DataError("An episode goes on after its last row.")
