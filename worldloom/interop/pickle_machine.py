"""An interpreter of pickles that cannot import or call anything: the stack machine without its unsafe instructions.

A pickle is a program for a stack machine (opcodes: protocol 2, PEP 307; protocol 4, PEP 3154; protocol 5, PEP 574; all
are described in :mod:`pickletools`). Two instructions, "look up this global" and "call it", let it run anything.
:class:`PickleReader` interprets the opcodes itself: a global is only a *name*, and calling it looks the name up in a
table of functions of this package.

The alternative, ``pickle.Unpickler`` with an allow-list in ``find_class``, is shorter and weaker:

- It uses the *real* callables, so safety depends on how ``numpy.ndarray``, ``numpy.dtype`` or ``_reconstruct`` treat
  arguments and state chosen by an attacker. Here nothing is imported and no foreign code is called.
- Its C implementation allocates without a check: a memo index of 2³¹ allocates 16 GiB for a file of ten bytes. Here
  every length is compared with the remaining bytes, every opcode is counted, and all copies are charged to a budget
  proportional to the file's size.
- It builds structures that hang whoever reads them: shared references that expand to 2⁶⁰ nodes, tuples whose hash takes
  as long or overflows the C stack, a list that contains itself. Here keys are scalars, and the result is a plain tree
  with bounded depth and number of nodes.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
import pickletools
import re
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NoReturn

import numpy as np

from worldloom.errors import FileFormatError
from worldloom.interop.archive import shorten

_MAX_OPCODES = 200_000  # the largest checkpoint of the official programs has about 30,000
_MAX_DEPTH = 50

Call = Callable[["PickleReader", tuple[Any, ...]], object]
"""Replacement for a foreign callable, (reader, arguments) → plain value; it validates the arguments."""


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Global:
    """A class or function that a pickle refers to, as its name ``"module.attribute"`` only."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Opaque:
    """Placeholder in a result for an object of an unknown class, whose contents were dropped."""

    class_name: str


class Record(dict[str, Any]):
    """What an object holds whose class is one of the ``records`` of a ``PickleReader``."""


class Unfinished:
    """An object that REDUCE creates empty and BUILD fills: ``finish`` validates the state and sets ``value`` once."""

    value: Any = None

    def finish(self, reader: PickleReader, state: Any) -> None:
        """Set ``value`` from the ``state`` of BUILD, or refuse the file."""
        raise NotImplementedError


def matches(value: object, pattern: object) -> bool:
    """Whether ``value`` equals ``pattern``, a scalar or tuple, in types too; safe for arrays, unlike ``==``."""
    if isinstance(pattern, tuple):
        return isinstance(value, tuple) and len(value) == len(pattern) and all(map(matches, value, pattern))
    return type(value) is type(pattern) and value == pattern


_HARMLESS_MODULES = frozenset({"collections", "datetime", "decimal", "enum", "fractions", "pathlib", "typing"})
_HARMLESS_BUILTINS = frozenset(
    t.__name__ for t in (bool, bytes, dict, float, frozenset, int, list, object, set, str, tuple)
)


def is_dangerous(name: str) -> bool:
    """Whether ``name`` is a global of the standard library other than a class of plain values.

    Safety does not depend on it, since nothing is called: it tells hostile files from files with foreign objects.
    """
    module, _, attribute = name.partition(".")
    harmless = module in _HARMLESS_MODULES or (module == "builtins" and attribute in _HARMLESS_BUILTINS)
    return module in sys.stdlib_module_names and not harmless and name != "copyreg._reconstructor"


class PickleReader:
    """Interprets one pickle.

    Args:
      stream: the pickle; ``size`` is its length in bytes.
      source: its name in error messages.
      calls: replacements of the allowed callables, by name.
      names: globals that are allowed as arguments only.
      stub_unknown: objects of other classes become :class:`Opaque` instead of an error. The mere name of a global for
        which :func:`is_dangerous` holds is refused all the same.
      persistent_load: function persistent id → value; None refuses persistent ids.
      budget: bytes that may be copied or scanned; None means four times ``size`` and 64 KiB.
      records: names of classes whose instances become dicts of their attributes or entries. Nothing of them is called.
    """

    def __init__(
        self,
        stream: BinaryIO,
        size: int,
        *,
        source: str,
        calls: Mapping[str, Call],
        names: frozenset[str],
        stub_unknown: bool = False,
        persistent_load: Callable[[object], object] | None = None,
        budget: int | None = None,
        records: frozenset[str] = frozenset(),
    ):
        self.source = source
        self._stream, self._left = stream, size
        self._calls, self._names = calls, names
        self._stub_unknown = stub_unknown
        self._persistent_load = persistent_load
        self._records = records
        self._budget = 4 * size + (1 << 16) if budget is None else budget
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Interpret the whole pickle and return its value: a tree of containers, scalars and arrays.

        Raises ``FileFormatError`` if the pickle is damaged, exceeds a bound, or holds anything that is not allowed.
        """
        if self.read(1) != pickle.PROTO or self.read(1)[0] not in (2, 3, 4, 5):
            self.refuse("is not a pickle of protocol 2 to 5")
        count = 0
        while (opcode := self.read(1)) != pickle.STOP:
            count += 1
            if count > _MAX_OPCODES:
                self.refuse(f"has more than {_MAX_OPCODES} pickle opcodes")
            instruction = _INSTRUCTIONS.get(opcode)
            if instruction is None:
                self.refuse(f"uses the pickle opcode {_opcode_name(opcode)}, which files of arrays never need")
            instruction(self)
        # STOP must be the last byte and leave exactly one value.
        if self._left or self._marks or len(self._stack) != 1:
            self.refuse("does not end where its pickle ends; it is damaged")
        return _TreeBuilder(self, max_nodes=4 * count + 1).build(self._stack[0])

    def refuse(self, why: str) -> NoReturn:
        """Raise a ``FileFormatError`` that says ``why`` this file is not read."""
        raise FileFormatError(f"{self.source} {why}.")

    def check(self, condition: bool, what: str) -> None:
        """Refuse the file unless ``condition`` holds: ``what`` has a form that no writer of such files produces."""
        if not condition:
            self.refuse(f"has a malformed {what}; it is damaged or was made to mislead")

    def charge(self, nbytes: int) -> None:
        """Charge ``nbytes`` about to be copied or scanned to the budget; refuses the file when it is spent."""
        self._budget -= nbytes
        if self._budget < 0:
            self.refuse("unfolds to far more bytes than it has")

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes; refuses the file if fewer are left."""
        if count > self._left:
            self.refuse("is truncated")
        self._left -= count
        data = self._stream.read(count)
        if len(data) != count:
            self.refuse("is truncated")
        return data

    def key(self, key: Any) -> Any:
        """Return ``key`` if it is a scalar; refuse the file otherwise."""
        # Hashing nested tuples can take exponential time or overflow the C stack; chosen integers collide.
        scalar = key is None or type(key) in (str, bytes, float, bool) or (type(key) is int and abs(key) < 1 << 64)
        self.check(scalar, f"key, a {type(key).__name__}")
        return key

    # One method for each group of opcodes; _instructions below binds them.

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self.read(struct.calcsize(layout)))[0]

    def _pop(self) -> Any:
        self.check(bool(self._stack), "stack")
        return self._stack.pop()

    def _top(self) -> Any:
        self.check(bool(self._stack), "stack")
        return self._stack[-1]

    def _pop_mark(self) -> list[Any]:
        self.check(bool(self._marks), "stack")
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _frame(self) -> None:
        # Frames (PEP 3154) only group bytes for buffered reading; their length is checked and otherwise ignored.
        self.check(self._number("<Q") <= self._left, "frame")

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _push_number(self, layout: str) -> None:
        self._stack.append(self._number(layout))

    def _push_long(self) -> None:
        self._stack.append(int.from_bytes(self.read(self._number("<B")), "little", signed=True))

    def _push_bytes(self, length_layout: str) -> None:
        self._stack.append(self.read(self._number(length_layout)))

    def _push_text(self, length_layout: str) -> None:
        self._stack.append(self._decode(self.read(self._number(length_layout))))

    def _push_empty(self, make: Callable[[], object]) -> None:
        self._stack.append(make())

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _tuple_from_mark(self) -> None:
        items = tuple(self._pop_mark())
        self._stack.append(items)

    def _tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(items)))

    def _frozenset(self) -> None:
        items = frozenset(self.key(item) for item in self._pop_mark())
        self._stack.append(items)

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._top()

    def _put(self, layout: str) -> None:
        self._memo[self._number(layout)] = self._top()

    def _get(self, layout: str) -> None:
        slot = self._number(layout)
        self.check(slot in self._memo, "memo")
        self._stack.append(self._memo[slot])

    def _append(self) -> None:
        self._extend([self._pop()])

    def _appends(self) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is list:
            target.extend(items)
        else:
            self.check(type(target) is Opaque, "list")

    def _add_items(self) -> None:
        items = self._pop_mark()
        self.check(type(self._top()) is set, "set")
        self._top().update(self.key(item) for item in items)

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._update([key, value])

    def _set_items(self) -> None:
        self._update(self._pop_mark())

    def _update(self, items: list[Any]) -> None:
        self.check(len(items) % 2 == 0, "dict")
        target = self._top()
        if type(target) in (dict, Record):
            target.update((self.key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))
        else:
            self.check(type(target) is Opaque, "dict")

    def _global(self) -> None:
        self._push_global(self._line(), self._line())

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self.check(type(name) is str and type(module) is str, "global")
        self._push_global(module, name)

    def _line(self) -> str:
        line = bytearray()
        while len(line) < 256 and (character := self.read(1)) != b"\n":
            line += character
        return self._decode(bytes(line))

    def _decode(self, data: bytes) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return self.refuse("has text that is not UTF-8; it is damaged")

    def _push_global(self, module: str, name: str) -> None:
        self.check(len(module) + len(name) < 256, "global")
        # Protocol 2 uses the names of Python 2, and old files those of numpy 1; pickle and numpy map them likewise.
        if module == "__builtin__":
            name = {"long": "int", "unicode": "str"}.get(name, name)
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        module = re.sub(r"^numpy\.core(?=\.|$)", "numpy._core", module)
        full = f"{module}.{name}"
        if re.fullmatch(r"[\w.<>]+", full, re.ASCII) is None:
            self.refuse(f"names the malformed global {shorten(full)}")
        if full not in self._calls and full not in self._names and full not in self._records:
            if not self._stub_unknown:
                self.refuse(f"names '{full}', which is not plain data that can be read; nothing was imported or called")
            if is_dangerous(full):
                self.refuse(
                    f"names '{full}', which no file of weights needs; it is hostile. Nothing was imported or called"
                )
        self._stack.append(Global(full))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        self.check(type(arguments) is tuple, "call")
        self._stack.append(self.call(function, arguments))

    def call(self, function: object, arguments: tuple[Any, ...]) -> object:
        """The value that replaces the result of calling ``function``, a :class:`Global`, with ``arguments``."""
        if not isinstance(function, Global):
            return self.refuse(f"calls a {type(function).__name__}; nothing was called")
        if function.name in self._calls:
            return self._calls[function.name](self, arguments)
        return self._stub(function)

    def _new_object(self, operands: int) -> None:
        for _ in range(operands):
            self._pop()
        cls = self._pop()
        if not isinstance(cls, Global):
            self.refuse(f"makes an instance of a {type(cls).__name__}; nothing was called")
        self._stack.append(Record() if cls.name in self._records else self._stub(cls))

    def _stub(self, function: Global) -> Opaque:
        if not self._stub_unknown or function.name in self._names or function.name in self._calls:
            self.refuse(f"makes an instance of '{function.name}' in a way that files of arrays never do")
        return Opaque(function.name)

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Unfinished):
            self.check(target.value is None, "array")
            target.finish(self, state)
        elif type(target) is Record and type(state) is dict:
            target.update((self.key(key), value) for key, value in state.items())
        elif type(target) is not Opaque and not (type(target) is dict and type(state) is dict):
            # A dict with attributes is an OrderedDict, such as PyTorch's state dicts; its attributes are dropped.
            self.refuse(f"sets attributes of a {type(target).__name__}, which files of arrays never do")

    def _persistent(self) -> None:
        if self._persistent_load is None:
            self.refuse("refers to data outside itself (a persistent id)")
        else:
            self._stack.append(self._persistent_load(self._pop()))


def _instructions() -> dict[bytes, Callable[[PickleReader], None]]:
    """The opcodes of protocols 2 to 5 that files of arrays use: all but INST, OBJ, EXT*, PERSID, DUP and buffers."""
    r, bind = PickleReader, functools.partial
    table: dict[bytes, Callable[[PickleReader], None]] = {
        pickle.FRAME: r._frame,
        pickle.MARK: r._mark,
        pickle.LONG1: r._push_long,
        pickle.TUPLE: r._tuple_from_mark,
        pickle.FROZENSET: r._frozenset,
        pickle.MEMOIZE: r._memoize,
        pickle.APPEND: r._append,
        pickle.APPENDS: r._appends,
        pickle.ADDITEMS: r._add_items,
        pickle.SETITEM: r._set_item,
        pickle.SETITEMS: r._set_items,
        pickle.GLOBAL: r._global,
        pickle.STACK_GLOBAL: r._stack_global,
        pickle.REDUCE: r._reduce,
        pickle.BUILD: r._build,
        pickle.BINPERSID: r._persistent,
    }
    constants = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False, pickle.EMPTY_TUPLE: ()}
    for opcode, value in constants.items():
        table[opcode] = bind(r._push, value=value)
    for opcode, make in {pickle.EMPTY_LIST: list, pickle.EMPTY_DICT: dict, pickle.EMPTY_SET: set}.items():
        table[opcode] = bind(r._push_empty, make=make)
    numbers = {pickle.BININT: "<i", pickle.BININT1: "<B", pickle.BININT2: "<H", pickle.BINFLOAT: ">d"}
    for opcode, layout in numbers.items():
        table[opcode] = bind(r._push_number, layout=layout)
    for opcode, layout in {pickle.SHORT_BINUNICODE: "<B", pickle.BINUNICODE: "<I", pickle.BINUNICODE8: "<Q"}.items():
        table[opcode] = bind(r._push_text, length_layout=layout)
    binary = {pickle.SHORT_BINBYTES: "<B", pickle.BINBYTES: "<I", pickle.BINBYTES8: "<Q", pickle.BYTEARRAY8: "<Q"}
    for opcode, layout in binary.items():
        table[opcode] = bind(r._push_bytes, length_layout=layout)
    for opcode, count in {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}.items():
        table[opcode] = bind(r._tuple, count=count)
    for opcode, layout in {pickle.BINPUT: "<B", pickle.LONG_BINPUT: "<I"}.items():
        table[opcode] = bind(r._put, layout=layout)
    for opcode, layout in {pickle.BINGET: "<B", pickle.LONG_BINGET: "<I"}.items():
        table[opcode] = bind(r._get, layout=layout)
    for opcode, count in {pickle.NEWOBJ: 1, pickle.NEWOBJ_EX: 2}.items():
        table[opcode] = bind(r._new_object, operands=count)
    return table


_INSTRUCTIONS = _instructions()


def _opcode_name(opcode: bytes) -> str:
    known = {op.code: op for op in pickletools.opcodes}.get(opcode.decode("latin-1"))
    return known.name if known else shorten(opcode)


class _TreeBuilder:
    """Expands the machine's result into a tree of plain values, with bounds on the number of nodes and the depth."""

    def __init__(self, reader: PickleReader, max_nodes: int):
        self._reader = reader
        self._nodes_left = max_nodes

    def build(self, value: Any, depth: int = 0) -> Any:
        self._nodes_left -= 1
        if self._nodes_left < 0 or depth > _MAX_DEPTH:
            self._reader.refuse(f"unfolds to far more values than it has opcodes, or to more than {_MAX_DEPTH} levels")
        if isinstance(value, Unfinished):
            self._reader.check(value.value is not None, "array")
            value = value.value
        if type(value) in (dict, Record):
            return {key: self.build(item, depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.build(item, depth + 1) for item in value)
        if type(value) is Global:
            return Opaque(value.name)
        if value is None or isinstance(value, _PLAIN):
            return value
        return self._reader.refuse(
            f"holds a bare {type(value).__name__.strip('_').lower()}, which is no value by itself"
        )


_PLAIN = (str, bytes, int, float, bool, set, frozenset, np.ndarray, np.generic, np.dtype, Opaque)
