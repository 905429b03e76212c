"""The base of all configs: frozen dataclasses that validate their fields and round-trip through JSON.

A field's type and limits stand in its annotation, and :func:`config_dataclass` checks them on construction::

    batch_size: Annotated[int, Ge(1)] = 16
    learning_rate: Annotated[float, Gt(0)] = 3e-4
    precision: Annotated[str, OneOf("auto", "float32", "bfloat16")] = "auto"
    iterations: Annotated[int | None, Ge(1)] = None  # limits hold for values other than None

``__post_init__`` is left with what relates several fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import numbers
import operator
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, dataclass_transform

from worldloom.errors import ConfigError, FileFormatError, UnknownFieldError
from worldloom.files import absolute_path, write_atomically
from worldloom.migration import field_of_training, renamed

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Ge:
    """Limit of a number: at least ``bound``, and finite."""

    bound: float

    def allows(self, value: Any) -> bool:
        """Whether ``value`` is within the limit."""
        return bool(value >= self.bound)

    def __str__(self) -> str:
        return f"≥ {self.bound}"


@dataclasses.dataclass(frozen=True)
class Gt:
    """Limit of a number: above ``bound``, and finite."""

    bound: float

    def allows(self, value: Any) -> bool:
        """Whether ``value`` is within the limit."""
        return bool(value > self.bound)

    def __str__(self) -> str:
        return f"above {self.bound}"


@dataclasses.dataclass(frozen=True)
class Lt:
    """Limit of a number: below ``bound``, and finite."""

    bound: float

    def allows(self, value: Any) -> bool:
        """Whether ``value`` is within the limit."""
        return bool(value < self.bound)

    def __str__(self) -> str:
        return f"below {self.bound}"


@dataclasses.dataclass(frozen=True)
class Between:
    """Limit of a number: from ``low`` to ``high``, both included. An infinite end admits that infinity."""

    low: float
    high: float

    def allows(self, value: Any) -> bool:
        """Whether ``value`` is within the limits."""
        return bool(self.low <= value <= self.high)

    def __str__(self) -> str:
        return f"from {self.low} to {self.high}"


@dataclasses.dataclass(frozen=True, init=False)
class OneOf:
    """The values that a field admits."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any):
        object.__setattr__(self, "values", values)

    def allows(self, value: Any) -> bool:
        """Whether ``value`` is one of them."""
        return value in self.values

    def __str__(self) -> str:
        *others, last = map(repr, self.values)
        return f"{', '.join(others)} or {last}" if others else last


_LIMITS = (Ge, Gt, Lt, Between, OneOf)


class FrozenMapping(Mapping[str, Any]):
    """A small hashable mapping that keeps its order: dict-valued config fields such as ``obs_shape`` become this."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any] | Iterable[tuple[str, Any]]):
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __eq__(self, other: object) -> bool:
        # Order counts: the decoder splits image channels in the order of the observation space.
        return isinstance(other, Mapping) and list(self.items()) == list(other.items())

    def __repr__(self) -> str:
        return repr(self._items)

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenMapping, (self._items,)


def freeze(value: Any) -> Any:
    """Make a JSON-like value hashable: lists become tuples, dicts become :class:`FrozenMapping`, recursively.

    Numbers of NumPy, JAX and the like become Python's, so that ``env.action_space.n`` or ``np.array([4])`` are as good
    as 2 or (4,): equal configs then hash alike and are written alike.
    """
    if isinstance(value, int) and value.bit_length() > 10_000:
        # Python itself refuses to print a little more than that.
        raise ConfigError(f"A setting, or one side of a shape, is {shown(value)}; 64 bits are the most.")
    if value is None or isinstance(value, bool | int | str) or type(value) is float:
        return value
    if hasattr(value, "dtype") and hasattr(value, "__array__"):
        import numpy as np  # here, because `worldloom --help` need not load it

        array = np.asarray(value)
        if array.dtype.kind in "biuf":
            # Wider floats than Python's have no counterpart there, and would stay NumPy's.
            return freeze((array.astype(np.float64) if array.dtype.itemsize > 8 else array).tolist())
    if isinstance(value, Mapping):
        return FrozenMapping({str(k): freeze(v) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return tuple(freeze(v) for v in value)
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    if is_number(value):
        return float(value)
    return value


def thaw(value: Any) -> Any:
    """Inverse of :func:`freeze` for JSON: tuples become lists, mappings become dicts."""
    if isinstance(value, Mapping):
        return {k: thaw(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [thaw(v) for v in value]
    return value


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the known name that replaces ``name`` or is closest to it; "" if none is close."""
    names = list(known)
    close = [renamed(name, names)] if renamed(name, names) else difflib.get_close_matches(name[:100], names, 1, 0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def check(condition: bool, message: str) -> None:
    """Raise :class:`ConfigError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


MAX_INTEGER = 2**63 - 1
"""Integers beyond this, or below its negative, are no setting: no array has such a size."""


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer, of Python or NumPy, that fits 64 bits, and not a ``bool``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return False
    return abs(int(value)) <= MAX_INTEGER


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number, of Python or NumPy, that fits a ``float``, and not a ``bool``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def as_integer(name: str, value: Any, least: int = 1) -> int:
    """``value`` of the argument ``name`` as Python's integer; raises ``ConfigError`` unless it is one ≥ ``least``."""
    check(is_integer(value) and value >= least, f"{name} must be an integer ≥ {least}, not {shown(value)}.")
    return operator.index(value)


def shown(value: Any) -> str:
    """``repr`` for messages; an integer too long to be read is described."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of about {value.bit_length() * math.log10(2):.0f} digits"
    return repr(value)


class _FieldRule(NamedTuple):
    """What a scalar field admits: values of one of ``kinds`` within all ``limits``."""

    kinds: tuple[type, ...]
    limits: tuple[Any, ...]

    @property
    def stores_float(self) -> bool:
        """Whether a number is stored as a float."""
        return float in self.kinds and int not in self.kinds

    def allows(self, value: Any) -> bool:
        """Whether ``value`` is of an admitted type and within the limits."""
        if value is None:
            return types.NoneType in self.kinds
        if not any(_is_a(value, kind) for kind in self.kinds):
            return False
        # Only `Between` with an infinite end admits an infinity; nothing admits NaN.
        finite = not isinstance(value, float) or math.isfinite(value)
        may_be_infinite = any(isinstance(limit, Between) for limit in self.limits)
        return (finite or may_be_infinite) and all(limit.allows(value) for limit in self.limits)

    def __str__(self) -> str:
        if any(isinstance(limit, OneOf) for limit in self.limits):
            allowed = " and ".join(map(str, self.limits))
        else:
            names = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}
            allowed = " or ".join(name for kind, name in names.items() if kind in self.kinds)
            allowed = f"{allowed} {' and '.join(map(str, self.limits))}".rstrip()
        return f"{allowed} or None" if types.NoneType in self.kinds else allowed


def _is_a(value: object, kind: type) -> bool:
    """``isinstance``, but a bool is no number and an int is a float."""
    if kind is int:
        return is_integer(value)
    return is_number(value) if kind is float else isinstance(value, kind)


@functools.cache
def _field_rules(cls: type) -> dict[str, _FieldRule]:
    """Rules of the fields of ``cls`` by name, read off the annotations of scalars (tuples and mappings have none)."""
    rules = {}
    for name, annotation in typing.get_type_hints(cls, include_extras=True).items():
        limits: tuple[Any, ...] = ()
        if typing.get_origin(annotation) is typing.Annotated:
            annotation, *extras = typing.get_args(annotation)
            limits = tuple(extra for extra in extras if isinstance(extra, _LIMITS))
        is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
        kinds = typing.get_args(annotation) if is_union else (annotation,)
        if all(kind in (int, float, bool, str, types.NoneType) for kind in kinds):
            rules[name] = _FieldRule(kinds, limits)
    return rules


def check_fields(cls: type, values: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` for the first of ``values`` that the annotation of that field of ``cls`` excludes."""
    rules = _field_rules(cls)
    for name, value in values.items():
        if name in rules and not rules[name].allows(value):
            too_long = type(value) is int and abs(value) > MAX_INTEGER and not rules[name].stores_float
            beyond = ", below 2^63" if too_long else ""
            raise ConfigError(f"{name} must be {rules[name]}{beyond}, not {shown(value)}.")


@dataclass_transform(frozen_default=True)
def config_dataclass(cls: type[T]) -> type[T]:
    """A frozen dataclass that checks its fields' types and limits and names the nearest field for an unknown one.

    Lists and dicts are frozen first, so that every instance is hashable: configs are static arguments of compiled
    functions. Each field given is checked by itself (:func:`check_fields`) before ``__post_init__`` runs.

    Raises (by the constructor):
      UnknownFieldError: a field does not exist, or a required one is missing.
      ConfigError: a value is of another type than its field or outside its limits.
    """
    new = dataclasses.dataclass(frozen=True)(cls)
    generated = new.__init__
    fields = dataclasses.fields(new)  # type: ignore[arg-type]
    names = [f.name for f in fields]
    required = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]

    @functools.wraps(generated)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in names:
                elsewhere = None if renamed(name, names) else field_of_training(name, names)
                hint = f" Training has it: TrainingConfig({elsewhere}=…)." if elsewhere else nearest(name, names)
                raise UnknownFieldError(
                    f"{cls.__name__} has no field '{name}'.{hint} Its fields are: {', '.join(names)}."
                )
        missing = [name for name in required[len(args) :] if name not in kwargs]
        if missing:
            raise UnknownFieldError(
                f"{cls.__name__} needs {', '.join(missing)}; write for example {cls.__name__}("
                + ", ".join(f"{name}=…" for name in required)
                + ")."
            )
        try:
            frozen, named = [freeze(value) for value in args], {k: freeze(v) for k, v in kwargs.items()}
        except RecursionError as error:
            raise ConfigError(f"A field of {cls.__name__} is nested too deeply to be one.") from error
        values = {**dict(zip(names, frozen, strict=False)), **named}
        check_fields(type(self), values)
        # 1 for a float is stored as 1.0, so that equal configs are written alike.
        owner: type = cls
        rules = _field_rules(owner)
        floats = {n: float(v) for n, v in values.items() if type(v) is int and n in rules and rules[n].stores_float}
        generated(self, **{**values, **floats})

    new.__init__ = __init__  # type: ignore[method-assign]
    return new


class BaseConfig:
    """Methods that every config has; subclasses are decorated with :func:`config_dataclass`."""

    example_shapes: ClassVar[Mapping[str, Any]] = {"obs_shape": (24,), "action_dim": 6}
    """Shapes for a look at a model without an environment (``worldloom info``)."""

    preset_parameters: ClassVar[Mapping[str, int]] = {}
    """Parameters of models of the presets for :attr:`example_shapes`; those of others are counted when asked for."""

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Sizes that :meth:`from_size` takes; none unless a config defines some."""
        return ()

    @classmethod
    def from_size(cls, size: str, *, obs_shape: Any, action_dim: Any, **overrides: Any) -> Self:
        """The config of a preset; ``overrides`` win. Raises ``ConfigError`` for a size that does not exist."""
        raise ConfigError(f"size={size!r} is not known; {cls.__name__} has no presets.")

    def replace(self, **changes: Any) -> Self:
        """A copy with ``changes``, validated like a new one."""
        known = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}  # type: ignore[arg-type]
        return type(self)(**{**known, **changes})

    def to_dict(self) -> dict[str, Any]:
        """All fields as a JSON-serialisable dict (tuples as lists); ``type(self)(**d)`` gives the config back."""
        return {f.name: thaw(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The fields that have a default, as in :meth:`to_dict`. Files of older versions lack newer fields."""
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        return {f.name: thaw(f.default) for f in fields if f.default is not dataclasses.MISSING}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a plain dict, such as a parsed ``config.json``; raises as the constructor does."""
        return cls(**dict(values))

    def to_json(self, path: str | Path | None = None) -> str:
        """All fields as indented JSON text, also written to ``path`` if one is given."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        if path is not None:
            write_atomically(path, text)
        return text

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read what :meth:`to_json` wrote. Raises ``FileFormatError`` on anything that is not a JSON object."""
        return cls.from_dict(read_json_object(path))


def read_json_object(path: str | Path, *, max_bytes: int = 1 << 20) -> dict[str, Any]:
    """Parse a small JSON file that must hold one object.

    Raises ``FileFormatError`` when it is larger than ``max_bytes``, is not UTF-8 JSON, names a key twice, or holds
    something else.
    """
    path = absolute_path(path)
    size = path.stat().st_size
    if size > max_bytes:
        raise FileFormatError(f"{path} has {size} bytes; a config file of at most {max_bytes} bytes is read.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path} holds a {type(value).__name__}; a JSON object with config fields is expected.")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ``ValueError`` if two programs could read different values of a key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r:.100} is there twice")
    return found
