"""What a row holds."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from worldloom.errors import ConfigError
from worldloom.replay.rows import Column

CONTINUOUS, DISCRETE = "continuous", "discrete"
UINT8, INT32, FLOAT32 = np.dtype(np.uint8), np.dtype(np.int32), np.dtype(np.float32)


class Action(NamedTuple):
    """One action array: its kind and size. ``fixed`` False means the size is the largest index seen so far, plus 1.

    Continuous actions are stored as float32 [dim], discrete ones as an int32 index, −1 where no action was chosen.
    """

    kind: str
    dim: int
    fixed: bool = True

    @property
    def column(self) -> Column:
        """How it is stored."""
        return Column((self.dim,), FLOAT32) if self.kind == CONTINUOUS else Column((), INT32)


@dataclasses.dataclass(frozen=True)
class Schema:
    """The observation and action arrays by key (``""`` for a bare one), and whether rows have a task."""

    obs: dict[str, Column]
    actions: dict[str, Action]
    has_task: bool

    @property
    def columns(self) -> dict[str, Column]:
        """Every column but the latents, by name."""
        columns = {column_name("obs", key): column for key, column in self.obs.items()}
        columns |= {column_name("actions", key): action.column for key, action in self.actions.items()}
        columns |= {"rewards": Column((), FLOAT32), "flags": Column((), UINT8), "stream": Column((), INT32)}
        return columns | ({"task": Column((), INT32)} if self.has_task else {})

    def to_json(self) -> dict[str, Any]:
        """As JSON values; pairs instead of objects, because the order of keys counts."""
        return {
            "obs": [[key, column.shape, column.dtype.name] for key, column in self.obs.items()],
            "actions": [[key, *action] for key, action in self.actions.items()],
            "has_task": self.has_task,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Schema:
        """Inverse of :meth:`to_json`; raises ``ValueError`` or ``TypeError`` on anything it does not write."""
        obs = {}
        for key, dims, dtype in values["obs"]:
            if dtype not in ("uint8", "float32"):
                raise ValueError(f"observations of dtype {dtype!r}")
            obs[_key(key)] = Column(shape(dims, "obs"), np.dtype(dtype))
        actions = {}
        for key, kind, dim, fixed in values["actions"]:
            actions[_key(key)] = Action(action_kind(kind), integer(dim, "action_dim", 1), bool(fixed))
        if not obs or not actions:
            raise ValueError("no observations or no actions")
        return cls(obs, actions, bool(values["has_task"]))


class Declared(NamedTuple):
    """What the user said about the data beforehand; None is to be inferred. Keys are ``""`` for a bare array."""

    obs_shape: dict[str, tuple[int, ...]] | None
    action_dim: dict[str, int] | None
    action_type: dict[str, str] | str | None

    @classmethod
    def check(cls, obs_shape: Any, action_dim: Any, action_type: Any) -> Declared:
        """From the arguments of the buffer; raises ``ConfigError``."""
        return cls(
            None if obs_shape is None else {k: shape(v, "obs_shape") for k, v in by_key(obs_shape).items()},
            None if action_dim is None else {k: integer(v, "action_dim", 1) for k, v in by_key(action_dim).items()},
            {k: action_kind(v) for k, v in action_type.items()}
            if isinstance(action_type, Mapping)
            else None
            if action_type is None
            else action_kind(action_type),
        )

    def to_json(self) -> dict[str, Any]:
        """As the arguments :meth:`check` takes."""
        return {
            "obs_shape": self.obs_shape and bare(self.obs_shape),
            "action_dim": self.action_dim and bare(self.action_dim),
            "action_type": self.action_type,
        }


def column_name(prefix: str, key: str) -> str:
    """``obs`` for a bare array, ``obs/image`` for the entry ``image`` of a dict."""
    return f"{prefix}/{key}" if key else prefix


def latent_name(key: str) -> str:
    """Column of the stored latents ``key``."""
    return f"latents/{key}"


def by_key(value: Any) -> dict[str, Any]:
    """A mapping as a dict; anything else under the key ``""``."""
    return dict(value) if isinstance(value, Mapping) else {"": value}


def bare(values: Mapping[str, Any]) -> Any:
    """Inverse of :func:`by_key`."""
    return values[""] if "" in values else dict(values)


def one_hot(index: np.ndarray, dim: int) -> np.ndarray:
    """Stored indices [...] → float32 [..., dim]; −1 becomes the zero vector."""
    return (index[..., None] == np.arange(dim, dtype=index.dtype)).astype(FLOAT32)


def integer(value: Any, name: str, minimum: int) -> int:
    """``value`` as an int of at least ``minimum``, or ``ConfigError``."""
    try:
        number = operator.index(value)
    except TypeError:
        number = minimum - 1
    if isinstance(value, bool) or not minimum <= number < 2**63:
        raise ConfigError(f"{name} must be an integer ≥ {minimum}, not {value!r}.")
    return number


def shape(value: Any, name: str) -> tuple[int, ...]:
    """A shape as a tuple of at least one size ≥ 1, or ``ConfigError``."""
    try:
        sizes = tuple(operator.index(size) for size in value)
    except TypeError:
        sizes = ()
    if not sizes or min(sizes) < 1 or len(sizes) > 16 or math.prod(sizes) >= 2**40:
        raise ConfigError(f"{name} must be a shape such as (4,) or (64, 64, 3), not {value!r}.")
    return sizes


def action_kind(value: Any) -> str:
    """``"continuous"`` or ``"discrete"``, or ``ConfigError``."""
    if value not in (CONTINUOUS, DISCRETE):
        raise ConfigError(f"action_type must be '{CONTINUOUS}' or '{DISCRETE}', not {value!r}.")
    return str(value)


def _key(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"key {value!r}")
    return value
