"""What a row consists of: observation and action arrays, their columns, and what the user declared about them."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from worldloom.errors import ConfigError
from worldloom.replay.table import Column
from worldloom.spaces import ACTION, OBS, unnamed

CONTINUOUS, DISCRETE = "continuous", "discrete"
UINT8, INT32, FLOAT32 = np.dtype(np.uint8), np.dtype(np.int32), np.dtype(np.float32)

_SINGLE = ""
"""Key of a single array in files, where inside it is ``"obs"`` or ``"action"``."""


class Action(NamedTuple):
    """Kind and size of one action array.

    Continuous actions are stored as float32 [dim], discrete ones as an int32 index, −1 where no action was chosen.

    Attributes:
      kind: ``"continuous"`` or ``"discrete"``.
      dim: size of a continuous action or number of discrete ones.
      fixed: False if ``dim`` was only inferred, as the largest index seen so far plus 1.
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
    """The observation and action arrays of a row, by key.

    Attributes:
      obs: observation arrays; a single one is named ``"obs"``.
      actions: action arrays; a single one is named ``"action"``.
      has_task: whether rows have a task.
      obs_is_mapping: whether callers give and get observations as a dict, even if it has one entry.
      actions_is_mapping: the same for actions.
    """

    obs: dict[str, Column]
    actions: dict[str, Action]
    has_task: bool
    obs_is_mapping: bool
    actions_is_mapping: bool

    def __str__(self) -> str:
        """``obs (3,) float32; actions 2 continuous``, or with the key before each entry of a dict."""
        obs = ", ".join(f"{k} " * self.obs_is_mapping + f"{c.shape} {c.dtype}" for k, c in self.obs.items())
        actions = ", ".join(f"{k} " * self.actions_is_mapping + f"{a.dim} {a.kind}" for k, a in self.actions.items())
        return f"obs {obs}; actions {actions}"

    # ---- in the caller's form -------------------------------------------------------------------------------------

    @property
    def obs_shape(self) -> Any:
        """Shape of one observation, or a dict of shapes."""
        return unnamed({key: column.shape for key, column in self.obs.items()}, self.obs_is_mapping)

    @property
    def action_dim(self) -> Any:
        """Size of an action or number of discrete ones, or a dict of these."""
        return unnamed({key: action.dim for key, action in self.actions.items()}, self.actions_is_mapping)

    @property
    def action_type(self) -> Any:
        """``"continuous"`` or ``"discrete"``, or a dict of these."""
        return unnamed({key: action.kind for key, action in self.actions.items()}, self.actions_is_mapping)

    def unpack_obs(self, columns: Mapping[str, np.ndarray]) -> Any:
        """Observations [...] from stored columns [...]: an array or dict of arrays."""
        return unnamed({key: columns[name] for key, name in self.obs_columns.items()}, self.obs_is_mapping)

    def unpack_actions(self, columns: Mapping[str, np.ndarray]) -> Any:
        """Actions from stored columns [...]: float32 [..., dim], or a dict of these; indices become one-hots."""
        names = self.action_columns
        actions = {
            key: one_hot(columns[names[key]], action.dim) if action.kind == DISCRETE else columns[names[key]]
            for key, action in self.actions.items()
        }
        return unnamed(actions, self.actions_is_mapping)

    # ---- columns --------------------------------------------------------------------------------------------------

    @property
    def obs_columns(self) -> dict[str, str]:
        """Key of each observation array → name of its column."""
        return {key: column_name("obs", key, self.obs_is_mapping) for key in self.obs}

    @property
    def action_columns(self) -> dict[str, str]:
        """Key of each action array → name of its column."""
        return {key: column_name("actions", key, self.actions_is_mapping) for key in self.actions}

    @property
    def columns(self) -> dict[str, Column]:
        """All columns but the latents, by name."""
        columns = {name: self.obs[key] for key, name in self.obs_columns.items()}
        columns |= {name: self.actions[key].column for key, name in self.action_columns.items()}
        columns |= {"rewards": Column((), FLOAT32), "flags": Column((), UINT8), "stream": Column((), INT32)}
        return columns | ({"task": Column((), INT32)} if self.has_task else {})

    # ---- in files -------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """As JSON values. Lists instead of objects, because the order of keys matters; a single array has key ``""``.

        Returns:
          ``{"obs": [[key, shape, dtype], …], "actions": [[key, kind, dim, fixed], …], "has_task": bool}``.
        """
        obs = [(key if self.obs_is_mapping else _SINGLE, column) for key, column in self.obs.items()]
        actions = [(key if self.actions_is_mapping else _SINGLE, action) for key, action in self.actions.items()]
        return {
            "obs": [[key, column.shape, column.dtype.name] for key, column in obs],
            "actions": [[key, *action] for key, action in actions],
            "has_task": self.has_task,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Schema:
        """Inverse of :meth:`to_json`; raises ``ValueError`` or ``TypeError`` on anything that it does not write."""
        obs = {}
        for key, dims, dtype in values["obs"]:
            if dtype not in ("uint8", "float32"):
                raise ValueError(f"observations of dtype {dtype!r}")
            obs[_check_key(key)] = Column(shape(dims, "obs"), np.dtype(dtype))
        actions = {}
        for key, kind, dim, fixed in values["actions"]:
            actions[_check_key(key)] = Action(action_kind(kind), integer(dim, "action_dim", 1), bool(fixed))
        if not obs or not actions:
            raise ValueError("no observations or no actions")
        obs_is_mapping, actions_is_mapping = (list(arrays) != [_SINGLE] for arrays in (obs, actions))
        if (obs_is_mapping and _SINGLE in obs) or (actions_is_mapping and _SINGLE in actions):
            raise ValueError("an array without a name beside others")
        return cls(
            obs if obs_is_mapping else {OBS: obs[_SINGLE]},
            actions if actions_is_mapping else {ACTION: actions[_SINGLE]},
            bool(values["has_task"]),
            obs_is_mapping,
            actions_is_mapping,
        )


class Declared(NamedTuple):
    """What the user declared about the data, in the form given; None is inferred from the first data.

    Attributes:
      obs_shape: shape of an observation, or a dict of shapes.
      action_dim: size of an action or number of discrete ones, or a dict of these.
      action_type: ``"continuous"`` or ``"discrete"`` for all actions, or a dict of these.
    """

    obs_shape: tuple[int, ...] | dict[str, tuple[int, ...]] | None
    action_dim: int | dict[str, int] | None
    action_type: str | dict[str, str] | None

    @classmethod
    def check(cls, obs_shape: Any, action_dim: Any, action_type: Any) -> Declared:
        """From the arguments of the buffer; raises ``ConfigError``."""

        def each(value: Any, check: Any) -> Any:
            if value is None:
                return None
            return {key: check(entry) for key, entry in value.items()} if isinstance(value, Mapping) else check(value)

        return cls(
            each(obs_shape, lambda value: shape(value, "obs_shape")),
            each(action_dim, lambda value: integer(value, "action_dim", 1)),
            each(action_type, action_kind),
        )

    def to_json(self) -> dict[str, Any]:
        """As the arguments of :meth:`check`."""
        return self._asdict()


def column_name(prefix: str, key: str, is_mapping: bool) -> str:
    """``obs`` for a single array, ``obs/image`` for the entry ``image`` of a dict."""
    return f"{prefix}/{key}" if is_mapping else prefix


def latent_name(key: str) -> str:
    """Column of the stored latents ``key``."""
    return f"latents/{key}"


def latent_columns(latents: Mapping[str, tuple[int, ...]]) -> dict[str, Column]:
    """Columns of the stored latents with these shapes per row."""
    return {latent_name(key): Column(size, FLOAT32) for key, size in latents.items()}


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


def latent_shapes(latents: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes per row of stored latents as tuples, or ``ConfigError``."""
    return {key: shape(size, f"latents[{key!r}]") for key, size in latents.items()}


def _check_key(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"key {value!r}")
    return value
