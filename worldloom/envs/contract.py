"""What ``reset`` and ``step`` of an environment must return, checked before anything is made of it."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np

from worldloom.errors import DataError, EnvContractError
from worldloom.spaces.leaves import describe

_OLD_API = (
    "This is the interface of Gymnasium since 0.26; GymV21CompatibilityV0 of the package shimmy translates "
    "environments of the older Gym."
)


def read_reset(answer: Any) -> Any:
    """The observation that ``reset`` returned. Raises ``EnvContractError`` unless it comes with a dict."""
    if type(answer) is not tuple or len(answer) != 2 or not isinstance(answer[1], Mapping):
        raise EnvContractError(
            f"reset returned {describe(answer)}; a tuple (observation, info), info a dict, is needed. {_OLD_API}"
        )
    return answer[0]


def read_step(answer: Any) -> tuple[Any, float, bool, bool, Mapping[str, Any]]:
    """Observation, reward, ``terminated``, ``truncated`` and info that ``step`` returned.

    Raises ``EnvContractError`` for anything but a tuple of five, a reward that is not one number, flags that are not
    booleans, and an info that is no dict.
    """
    if type(answer) is not tuple or len(answer) != 5:
        raise EnvContractError(
            f"step returned {describe(answer)}; a tuple (observation, reward, terminated, truncated, info) is needed. "
            f"{_OLD_API}"
        )
    obs, reward, terminated, truncated, info = answer
    if type(reward) is not float:
        reward = _number(reward)
    if type(terminated) is not bool:
        terminated = _boolean("terminated", terminated)
    if type(truncated) is not bool:
        truncated = _boolean("truncated", truncated)
    if type(info) is not dict and not isinstance(info, Mapping):
        raise EnvContractError(f"The info that step returned is {describe(info)}; a dict is needed.")
    return obs, reward, terminated, truncated, info


def read_vector_step(answer: Any, num_envs: int) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, Any]:
    """The same of a Gymnasium vector environment: observations, reward, ``terminated``, ``truncated`` [N], infos."""
    if type(answer) is not tuple or len(answer) != 5:
        raise EnvContractError(
            f"step returned {describe(answer)}; a tuple (observations, rewards, terminations, truncations, infos) is "
            f"needed. {_OLD_API}"
        )
    obs, reward, terminated, truncated, info = answer
    reward, terminated, truncated = np.asarray(reward), np.asarray(terminated), np.asarray(truncated)
    for name, value, kinds, allowed in (
        ("The rewards", reward, "fiub", "numbers"),
        ("terminated", terminated, "b", "booleans"),
        ("truncated", truncated, "b", "booleans"),
    ):
        if value.shape != (num_envs,) or value.dtype.kind not in kinds:
            raise EnvContractError(
                f"{name}: shape {value.shape} and dtype {value.dtype} were returned; {allowed} of shape ({num_envs},) "
                "are needed, one for each environment."
            )
    return obs, reward, terminated, truncated, info


def excluded(error: DataError, source: str) -> EnvContractError:
    """The error about an observation that ``reset`` or ``step`` (``source``) returned."""
    return EnvContractError(f"{source} returned what the environment's space excludes. {error}")


def explain(error: Exception) -> None:
    """Raise ``EnvContractError`` if ``error``, of a call of an environment, comes from the interface of older Gym."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    in_wrapper = "/gymnasium/" in frame.filename or "/worldloom/envs/" in frame.filename
    if in_wrapper and ("to unpack" in str(error) or "cannot unpack" in str(error)):
        raise EnvContractError(
            "A wrapper could not read what the environment returned. step must return (observation, reward, "
            f"terminated, truncated, info), and reset (observation, info). {_OLD_API}"
        ) from error
    if in_wrapper and isinstance(error, TypeError) and "unexpected keyword argument 'seed'" in str(error):
        raise EnvContractError(
            f"reset takes no seed; reset(*, seed=None, options=None) is needed. {_OLD_API}"
        ) from error


def _number(value: Any) -> float:
    """A reward as a float; arrays without axes are numbers too."""
    if isinstance(value, np.floating | int | np.integer):
        return float(value)
    array = None
    with contextlib.suppress(ValueError, TypeError, RuntimeError):
        array = np.asarray(value)
    if array is None or array.shape != () or array.dtype.kind not in "fiub":
        raise EnvContractError(f"The reward is {_describe_array(value)}; one number is needed.")
    return float(array)


def _boolean(name: str, value: Any) -> bool:
    if isinstance(value, np.bool_):
        return bool(value)
    array = None
    with contextlib.suppress(ValueError, TypeError, RuntimeError):
        array = np.asarray(value)
    if array is None or array.shape != () or array.dtype != np.bool_:
        raise EnvContractError(f"{name} is {_describe_array(value)}; True or False is needed.")
    return bool(array)


def _describe_array(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"{describe(value)} of shape {tuple(shape)}" if shape else describe(value)
