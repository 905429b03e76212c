"""Single arrays from callers, converted to what is stored.

Images (three axes) stay uint8 (0–255) or become float32 (0–1); other observations, continuous actions (in [−1, 1]) and
rewards become float32, discrete actions int32 indices. Everything else raises ``DataError``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from worldloom.errors import DataError
from worldloom.replay.index import FIRST, LAST, TERMINAL
from worldloom.replay.schema import CONTINUOUS, DISCRETE, FLOAT32, INT32, UINT8, Action
from worldloom.replay.table import Column

TOLERANCE = 1e-6
"""How far rounding may take a continuous action beyond ±1, or a float image beyond 0 and 1."""

MAX_INFERRED_ACTIONS = 4096
"""More discrete actions than this must be declared with ``action_dim``."""


# ---- numbers ------------------------------------------------------------------------------------------------------


def as_numbers(value: Any, what: str, kinds: str = "biuf") -> np.ndarray:
    """Anything array-like as an array of numbers, of any rank; ``kinds`` are the allowed ``dtype.kind`` letters."""
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
    array = as_numbers(value, what)
    if array.ndim == 0:
        raise DataError(f"{what} is a single number; an array with one row per step is needed.")
    return array


def as_finite_floats(array: np.ndarray, what: str) -> np.ndarray:
    """As float32, all of it finite."""
    with np.errstate(over="ignore"):
        converted = array.astype(FLOAT32)
    finite = np.isfinite(converted)
    if not finite.all():
        step = np.argwhere(~finite)[0][0]
        raise DataError(f"{what} holds NaN or infinite values (in float32), first at step {step}. Nothing was stored.")
    return converted


def check_length(what: str, length: int, expected: int) -> None:
    """Raise ``DataError`` unless ``length`` is ``expected``."""
    if length != expected:
        raise DataError(f"Lengths do not agree: {what} has {length} entries, {expected} are needed.")


# ---- observations -------------------------------------------------------------------------------------------------


def infer_obs_column(array: np.ndarray, what: str) -> Column:
    """How observations ``[N, *shape]`` are stored."""
    shape = array.shape[1:]
    if not shape or 0 in shape:
        raise DataError(f"{what} has shape {array.shape}; it needs a time axis and then the observation, as in [N, 4].")
    if len(shape) == 3 and array.dtype.kind != "f" and array.dtype != UINT8:
        raise DataError(f"{what} holds images of dtype {array.dtype}; give uint8 (0–255) or floats (0–1).")
    return Column(shape, UINT8 if len(shape) == 3 and array.dtype == UINT8 else FLOAT32)


def convert_obs(array: np.ndarray, column: Column, what: str) -> np.ndarray:
    """Observations ``[N, *shape]`` as stored in ``column``; raises ``DataError`` if they do not fit it."""
    if array.shape[1:] != column.shape:
        raise DataError(
            f"{what} has shape {array.shape}; observations here have shape {column.shape} after the time axis."
        )
    given = infer_obs_column(array, what)
    if given.dtype != column.dtype:
        raise DataError(f"{what} has dtype {array.dtype}; the images here are stored as {column.dtype}, do not mix.")
    if column.dtype == UINT8:
        return array
    converted = as_finite_floats(array, what)
    if len(column.shape) == 3:
        low, high = converted.min(initial=0.0), converted.max(initial=0.0)
        if low < -TOLERANCE or high > 1 + TOLERANCE:
            raise DataError(
                f"{what} holds float images from {low:g} to {high:g}; floats are 0–1. Divide by 255, or give uint8."
            )
    return converted


# ---- actions ------------------------------------------------------------------------------------------------------


def infer_action(array: np.ndarray, kind: str | None, dim: int | None, what: str) -> Action:
    """Kind and size of actions ``[n]`` or ``[n, A]``; those not declared are inferred.

    Integers are discrete, floats continuous.
    """
    kind = kind or (CONTINUOUS if array.dtype.kind == "f" else DISCRETE)
    if kind == DISCRETE and array.ndim == 1:
        return Action(DISCRETE, dim or 1, fixed=dim is not None)
    if array.ndim != 2 or array.shape[1] == 0:
        raise DataError(
            f"{what} has shape {array.shape}; continuous actions are [n, action_dim] (reshape a single one to [n, 1]), "
            "discrete ones integers [n] or one-hots [n, number of actions]."
        )
    return Action(kind, dim or array.shape[1])


def convert_actions(array: np.ndarray, action: Action, optional: np.ndarray, what: str) -> tuple[np.ndarray, Action]:
    """Actions as stored, and ``action``, its size increased if it is not fixed.

    Args:
      array: [n] or [n, A].
      action: their expected kind and size.
      optional: bool [n], True where no action need be chosen (an episode's last row): −1 or a zero vector is allowed
        there.
      what: name for messages.
    """
    if action.kind == CONTINUOUS:
        return convert_continuous(array, action, what), action
    index = _to_indices(array, action, optional, what)
    if not action.fixed:
        # A stray number must not widen all batches; more actions than the limit have to be declared.
        action = action._replace(dim=max(action.dim, min(int(index.max(initial=0)) + 1, MAX_INFERRED_ACTIONS)))
    bad = (index >= action.dim) | (index < 0) & ~(optional & (index == -1))
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


def convert_continuous(array: np.ndarray, action: Action, what: str) -> np.ndarray:
    """Continuous actions [n, dim] as float32; raises ``DataError`` beyond [−1, 1]."""
    if array.shape[1:] != (action.dim,):
        raise DataError(f"{what} has shape {array.shape}; continuous actions here are [n, {action.dim}].")
    converted = as_finite_floats(array, what)
    bad = np.abs(converted) > 1 + TOLERANCE
    if bad.any():
        step, entry = np.argwhere(bad)[0]
        raise DataError(
            f"{what}[{step}, {entry}] is {converted[step, entry]:g}; continuous actions lie in [-1, 1]. Scale them: "
            "2 * (action - low) / (high - low) - 1, with the environment's bounds."
        )
    return converted


def _to_indices(array: np.ndarray, action: Action, optional: np.ndarray, what: str) -> np.ndarray:
    """Integers [n] from integers [n] or one-hots [n, A]; a zero vector where ``optional`` becomes −1."""
    if array.ndim == 1 and array.dtype.kind in "iu":
        return array.astype(np.int64)
    if array.ndim == 1 or array.shape[1:] != (action.dim,):
        raise DataError(
            f"{what} has shape {array.shape} and dtype {array.dtype}; discrete actions are integers [n] or one-hots "
            f"[n, {action.dim}]."
        )
    ones = (array == 1).sum(axis=1)
    valid = ((array == 0) | (array == 1)).all(axis=1) & ((ones == 1) | optional & (ones == 0))
    if not valid.all():
        step = int(np.argmin(valid))
        raise DataError(
            f"{what}[{step}] is {array[step].tolist()}: not a one-hot vector. Continuous? Say action_type='continuous'."
        )
    return np.where(ones == 1, array.argmax(axis=1), -1)


# ---- rewards, tasks and flags -------------------------------------------------------------------------------------


def convert_rewards(value: Any, count: int) -> np.ndarray:
    """Rewards as float32 [count]."""
    array = as_array(value, "rewards")
    if array.ndim != 1:
        raise DataError(f"rewards has shape {array.shape}; one number per step, [n], is needed.")
    check_length("rewards", len(array), count)
    return as_finite_floats(array, "rewards")


def convert_bools(value: Any, count: int, what: str) -> np.ndarray:
    """Booleans [count], one per step, from booleans or from numbers that are 0 or 1."""
    array = as_array(value, what)
    if array.ndim != 1:
        raise DataError(f"{what} has shape {array.shape}; one boolean per step, [n], is needed.")
    check_length(what, len(array), count)
    other = (array != 0) & (array != 1)
    if other.any():
        raise DataError(f"{what} holds {array[other][0]}; booleans (or 0 and 1) are needed.")
    return array.astype(bool)


def convert_integers(value: Any, count: int, what: str) -> np.ndarray:
    """Integers ≥ 0 as int32 [count], from one integer or [count]."""
    array = as_numbers(value, what, "iu")
    if array.shape not in ((), (count,)):
        raise DataError(f"{what} has shape {array.shape}; one integer, or {count} of them, is needed.")
    if array.size and not (array.min() >= 0 and array.max() <= np.iinfo(np.int32).max):
        raise DataError(f"{what} must lie in 0 … {np.iinfo(np.int32).max}, not {array.min()} … {array.max()}.")
    return np.broadcast_to(array.astype(INT32), (count,))


def ends_in_terminal(dones: Any, terminated: Any, truncated: Any, *, steps: int) -> bool:
    """Whether an episode of ``steps`` steps ended in a terminal state.

    Each argument is None, a scalar for the last step, or one value per step [steps].
    """
    given = {"dones": dones, "terminated": terminated, "truncated": truncated}
    flags = {name: _last_step(value, steps, name) for name, value in given.items() if value is not None}
    done, terminal, timeout = flags.get("dones"), flags.get("terminated"), flags.get("truncated")
    if terminal is None:
        # Older Gym: one flag for both ends; a time limit, if reported at all, has a flag beside it.
        terminal = bool(done) and not timeout
    # dones is the "or" of the other two; if True beside terminated=False, truncated may be left out, but not be False.
    ended = bool(terminal or timeout)
    contradiction = done is not None and ((ended and not done) or (done and not ended and timeout is not None))
    if contradiction:
        raise DataError(
            f"dones says {done} at the last step, terminated {terminal} and truncated {timeout}; dones is their 'or'. "
            "Give terminated and truncated alone."
        )
    return terminal


def _last_step(value: Any, steps: int, what: str) -> bool:
    """The flag of the last step; those before it must be False."""
    array = as_numbers(value, what)
    flags = convert_bools(array[None] if array.ndim == 0 else array, 1 if array.ndim == 0 else steps, what)
    if flags[:-1].any():
        raise DataError(
            f"{what} is True at step {int(np.argmax(flags))} of {steps}, in the middle of the episode. Split "
            "there, and add each episode by itself."
        )
    return bool(flags[-1])


def pack_flags(is_first: Any, is_last: Any, is_terminal: Any) -> np.ndarray:
    """The ``flags`` column, uint8 [N], from boolean arrays [N]."""
    return (is_first * np.uint8(FIRST) | is_last * np.uint8(LAST) | is_terminal * np.uint8(TERMINAL)).astype(UINT8)
