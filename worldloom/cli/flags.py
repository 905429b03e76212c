"""Command-line flags from config fields: ``batch_size`` is ``--batch-size``; notes give help, annotations types."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from worldloom.config import nearest
from worldloom.errors import ConfigError, UnknownFieldError

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class Flag(NamedTuple):
    """One flag.

    Attributes:
      name: name of the config field, with underscores.
      kind: its type annotation.
      note: help text, a sentence or two.
      default: default shown in the help; None shows none.
      aliases: additional names.
      words: how many words follow, each of type ``kind``: None is one value, a number that many, ``"+"`` one or more.
    """

    name: str
    kind: Any
    note: str
    default: Any = None
    aliases: tuple[str, ...] = ()
    words: int | str | None = None

    @property
    def options(self) -> list[str]:
        """``--batch-size`` and its aliases."""
        return [f"--{name.replace('_', '-')}" for name in (*self.aliases, self.name)]


FAMILY_FLAG = Flag("family_module", str, "Module (or .py file) of your own that registers a family; imported first.")
"""Read by ``cli.main`` before the command is: a family brings further flags."""


def take_family_modules(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """``words`` without their ``--family-module`` options, and the values of these."""
    rest, modules, waiting = [], [], False
    for word in words:
        name, equals, value = _dashes(word).partition("=")
        if waiting:
            modules.append(word)
            waiting = False
        elif name == FAMILY_FLAG.options[0]:
            waiting = not equals
            modules += [value] if equals else []
        else:
            rest.append(word)
    if waiting:
        raise ConfigError("--family-module needs a module or a .py file.")
    return rest, modules


def config_flags(config: type, *, exclude: Iterable[str] = ()) -> list[Flag]:
    """One flag for each field of a config class except those in ``exclude``."""
    notes, hints = field_notes(config), typing.get_type_hints(config)
    return [
        Flag(field.name, hints[field.name], notes.get(field.name, ""), _default(field))
        for field in dataclasses.fields(config)
        if field.name not in exclude
    ]


def field_notes(config: type) -> dict[str, str]:
    """The docstrings below the fields of a class, which Python keeps in the source only."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0].body  # type: ignore[attr-defined]
    return {
        ast.unparse(field.target): " ".join(str(note.value.value).split())
        for field, note in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant)
    }


class FlagParser:
    """Argument parser of one command.

    Args:
      command: its name.
      about: description above the help.
      argument: name of the positional argument; empty for none. ``argument_help`` describes it.
      epilog: text below the help.
      many: whether there may be several positional arguments, which become a list.
    """

    def __init__(
        self,
        command: str,
        about: str,
        *,
        argument: str = "",
        argument_help: str = "",
        epilog: str = "",
        many: bool = False,
    ):
        self.command = command
        self._parser = _Parser(
            prog=f"worldloom {command}",
            usage=f"worldloom {command}{' ' + argument.upper() if argument else ''} [options]",
            description=about,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._flags: dict[str, Flag] = {}
        if argument:
            self._parser.add_argument(argument, help=argument_help, nargs="+" if many else None)

    def group(self, title: str, flags: Sequence[Flag]) -> None:
        """Add flags under a heading. Raises ``ValueError`` for a name that exists already."""
        group = self._parser.add_argument_group(title)
        for flag in flags:
            if flag.name in self._flags:
                raise ValueError(f"Two flags are called {flag.name}.")
            self._flags[flag.name] = flag
            # argparse formats help with %.
            note = flag.note.replace("`", "").replace("%", "%%") + (
                "" if flag.default is None else f" [{flag.default}]"
            )
            if flag.kind is list:
                group.add_argument(*flag.options, dest=flag.name, action="append", metavar="NAME=VALUE", help=note)
            elif flag.kind is bool or bool in typing.get_args(flag.kind):
                group.add_argument(
                    *flag.options, dest=flag.name, nargs="?", const="true", metavar=_metavar(flag.kind), help=note
                )
                no = f"--no-{flag.name.replace('_', '-')}"
                group.add_argument(no, dest=flag.name, action="store_const", const="false", help=argparse.SUPPRESS)
            else:
                group.add_argument(
                    *flag.options, dest=flag.name, metavar=_metavar(flag.kind), help=note, nargs=flag.words
                )

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        """Values of the given arguments by name; ``--batch_size`` works like ``--batch-size``.

        Raises:
          UnknownFieldError: a flag is unknown; the message suggests the nearest one.
          ConfigError: a value is missing or of another type, or an argument is unexpected.
        """
        values, rest = self._parser.parse_known_args([_dashes(word) for word in words])
        if rest:
            known = [option for option in self._parser._option_string_actions if option.startswith("--")]
            name = rest[0].partition("=")[0]
            if not name.startswith("-"):
                raise ConfigError(f"'{name}' is not expected; see worldloom {self.command} --help.")
            raise UnknownFieldError(
                f"worldloom {self.command} has no flag '{name}'.{nearest(name, known)} "
                f"See worldloom {self.command} --help."
            )
        given = {name: value for name, value in vars(values).items() if value is not None}
        return {name: self._convert(name, value) for name, value in given.items()}

    def _convert(self, name: str, text: Any) -> Any:
        if name not in self._flags:
            return text
        if self._flags[name].kind is list:
            found = [parse_assignment(self._flags[name], each) for each in text]
            options = [option for option, _ in found]
            for option in options:
                if options.count(option) > 1:
                    words = " and ".join(f"{option}={value}" for each, value in found if each == option)
                    raise ConfigError(f"{self._flags[name].options[0]} was given {words}; give one.")
            return dict(found)
        if isinstance(text, list):
            return tuple(parse_value(self._flags[name], word) for word in text)
        return parse_value(self._flags[name], text)


def peek_option(words: Sequence[str], option: str) -> str | None:
    """The value of ``option`` in ``words``, or None; used before the set of flags is known. The last one counts.

    Of an option that may stand without a value, the value is then "true", and "false" for ``--no-…``.
    """
    found = None
    for word, following in itertools.zip_longest(words, words[1:]):
        name, equals, value = _dashes(word).partition("=")
        if name == option:
            found = value if equals else following
        elif name == f"--no-{option[2:]}":
            found = "false"
    return found


def parse_assignment(flag: Flag, text: str) -> tuple[str, Any]:
    """Name and value of ``noops=30``, a name alone meaning True; values are read as JSON, and else as texts.

    Raises ``ConfigError`` if it is no assignment.
    """
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not name.isidentifier():
        raise ConfigError(f"{flag.options[0]} takes NAME=VALUE, as in {flag.options[0]} noops=30, not '{text}'.")
    if not equals or value.lower() in ("true", "false"):
        return name, value.lower() != "false"
    if value.lower() == "none":
        return name, None
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def parse_value(flag: Flag, text: str) -> Any:
    """The value of ``text`` in the type of ``flag``: ``3,64,64`` or ``[3, 64, 64]``, ``1e6``, ``none``, ``{"a": 2}``.

    Raises ``ConfigError`` if it fits none of the field's types.
    """
    kinds = typing.get_args(flag.kind) if _is_union(flag.kind) else (flag.kind,)
    if types.NoneType in kinds and text.lower() == "none":
        return None
    for kind in sorted(kinds, key=_strictness):
        try:
            return _parse_as(text, typing.get_origin(kind) or kind)
        except ValueError:
            continue
    raise ConfigError(f"{flag.options[0]} takes {_metavar(flag.kind)}, not '{text}'.")


def _parse_as(text: str, kind: Any) -> Any:
    """``text`` as a value of type ``kind``; raises ``ValueError`` if it is none."""
    if kind is bool:
        if text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
        raise ValueError(text)
    if kind is int:
        try:
            return int(text)
        except ValueError:
            number = float(text)  # such as 1e6
            if not number.is_integer():
                raise
            return int(number)
    if kind is float:
        return float(text)
    if kind is str:
        return text
    if kind is tuple:
        value = json.loads(text if text.lstrip().startswith("[") else f"[{text.strip('() ').rstrip(',')}]")
        return tuple(value)
    if kind is Mapping or (isinstance(kind, type) and issubclass(kind, Mapping)):
        if re.fullmatch(r"\w+=-?\d+(,\w+=-?\d+)*", text):  # data=2,fsdp=4
            parts = (part.partition("=") for part in text.split(","))
            return {name: int(number) for name, _, number in parts}
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    raise ValueError(text)


def _strictness(kind: Any) -> int:
    """Sort key of types: those that fewer texts can be parsed as are tried first."""
    order = (Mapping, tuple, bool, int, float, str)
    kind = typing.get_origin(kind) or kind
    return next((i for i, known in enumerate(order) if kind is known), 0)


def _metavar(kind: Any) -> str:
    kinds = typing.get_args(kind) if _is_union(kind) else (kind,)
    names = {int: "INT", float: "FLOAT", bool: "BOOL", str: "TEXT", tuple: "N,N,…", types.NoneType: "none"}
    return " | ".join(names.get(typing.get_origin(k) or k, "JSON") for k in kinds)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _default(field: dataclasses.Field[Any]) -> Any:
    return None if field.default is dataclasses.MISSING else field.default


def _dashes(word: str) -> str:
    """``--batch_size=8`` → ``--batch-size=8``; values keep their underscores."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


class _Parser(argparse.ArgumentParser):
    """Raises ``ConfigError`` instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}; see {self.prog} --help.")
