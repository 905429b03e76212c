"""What every config has in common: frozen dataclasses that are checked at the door and round-trip through JSON."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar, dataclass_transform

from worldloom.errors import ConfigError, FileFormatError, UnknownFieldError
from worldloom.files import write_atomically

T = TypeVar("T")


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
    """Make a JSON-like value hashable: lists become tuples, dicts become :class:`FrozenMapping`, recursively."""
    if isinstance(value, Mapping):
        return FrozenMapping({str(k): freeze(v) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return tuple(freeze(v) for v in value)
    return value


def thaw(value: Any) -> Any:
    """Inverse of :func:`freeze` for JSON: tuples become lists, mappings become dicts."""
    if isinstance(value, Mapping):
        return {k: thaw(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [thaw(v) for v in value]
    return value


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the known name closest to ``name``, or an empty string if none is close."""
    close = difflib.get_close_matches(name[:100], list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def check(condition: bool, message: str) -> None:
    """Raise :class:`ConfigError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def is_integer(value: object) -> bool:
    """Whether ``value`` is an ``int`` and not a ``bool``."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether ``value`` is a ``float``, or an ``int`` that fits one, and not a ``bool``."""
    if isinstance(value, bool) or not isinstance(value, int):
        return isinstance(value, float)
    return abs(value) < 2**1023


@dataclass_transform(frozen_default=True)
def config_dataclass(cls: type[T]) -> type[T]:
    """A frozen dataclass whose constructor answers unknown fields with the nearest known one.

    Fields given as lists or dicts are frozen first, so that every instance is hashable (configs are static
    arguments of compiled functions).
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
                raise UnknownFieldError(
                    f"{cls.__name__} has no field '{name}'.{nearest(name, names)} Its fields are: {', '.join(names)}."
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
        generated(self, *frozen, **named)

    new.__init__ = __init__  # type: ignore[method-assign]
    return new


class BaseConfig:
    """Methods that every config has; subclasses are decorated with :func:`config_dataclass`."""

    def replace(self, **changes: Any) -> Self:
        """A copy with ``changes``, validated like a new one."""
        known = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}  # type: ignore[arg-type]
        return type(self)(**{**known, **changes})

    def to_dict(self) -> dict[str, Any]:
        """All fields as a JSON-serialisable dict (tuples as lists); ``type(self)(**d)`` gives the config back."""
        return {f.name: thaw(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

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

    Raises ``FileFormatError`` when it is larger than ``max_bytes``, is not UTF-8 JSON, or holds something else.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > max_bytes:
        raise FileFormatError(f"{path} has {size} bytes; a config file of at most {max_bytes} bytes is read.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path} holds a {type(value).__name__}; a JSON object with config fields is expected.")
    return value
