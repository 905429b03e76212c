"""``worldloom data inspect | convert``: recorded datasets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.cli.flags import Flag, FlagParser
from worldloom.config import nearest
from worldloom.data.opening import KINDS
from worldloom.errors import ConfigError, MissingDependencyError

DATA_OPTIONS = [
    Flag("data_option", list, "Option of worldloom.data.open, such as action_dim=4; may be repeated."),
    Flag("download", bool, "Download a Minari dataset that is not on this machine."),
]
_INSPECT = [
    Flag("episodes", int, "Read so many episodes only, spread evenly."),
    Flag("picture", str, "PNG of returns and lengths to write.", "<dataset>.png"),
    Flag("problems", int, "How many problems to print.", 20),
]
_CONVERT = [Flag("to", str, "Folder to write: uncompressed .npz files, which are streamed from disk.")]
_OPTIONS = ("obs_shape", "action_dim", "action_type", "action_bounds", "drop_keys", "join_actions")


def data(words: Sequence[str]) -> int:
    """Look into a dataset, or write it in the form that is streamed fastest."""
    actions = {"inspect": inspect_command, "convert": convert_command}
    if not words or words[0] not in actions:
        about = (
            "usage: worldloom data inspect SPEC [options]\n       worldloom data convert SPEC --to FOLDER [options]\n"
        )
        formats = "\n".join(f"  {name + ':':12} {text}" for name, text in KINDS.items())
        print(f"{about}\nSPEC is a path, whose format is recognised, or names its format:\n\n{formats}")
        if not words or words[0] in ("-h", "--help"):
            raise SystemExit(0)
        raise ConfigError(f"There is no 'worldloom data {words[0]}'.{nearest(words[0], actions)}")
    return actions[words[0]](words[1:])


def open_dataset(spec: str, given: dict[str, Any]) -> Any:
    """The dataset ``spec`` with the options among the ``given`` flags. Raises ``ConfigError`` for an unknown one."""
    from worldloom.data import open as open_data

    options = dict(given.get("data_option", {}))
    for name in options:
        if name not in _OPTIONS:
            raise ConfigError(f"--data-option {name}: there is no such option.{nearest(name, _OPTIONS)}")
    for name in ("obs_shape", "action_bounds"):
        if isinstance(options.get(name), list):
            options[name] = tuple(options[name])
    return open_data(spec, download=given.get("download", False), progress=True, **options)


def inspect_command(words: Sequence[str]) -> int:
    """``worldloom data inspect``."""
    from worldloom.data.inspection import inspect
    from worldloom.report.datasets import dataset_picture

    given = _parse("inspect", "Spaces, episodes, returns, lengths, ends and problems of a dataset.", _INSPECT, words)
    dataset = open_dataset(given["spec"], given)
    found = inspect(
        dataset,
        max_episodes=given.get("episodes"),
        max_problems=given.get("problems", 20),
        progress=_bar("Reading episodes"),
    )
    print(_text(found), flush=True)
    path = Path(given.get("picture") or f"{_slug(given['spec'])}.png")
    try:
        dataset_picture(found.returns, found.lengths, found.terminal, path, title=given["spec"])
        print(f"picture       {path}")
    except MissingDependencyError as error:
        print(f"No picture: {error}")
    return 1 if found.unreadable else 0


def convert_command(words: Sequence[str]) -> int:
    """``worldloom data convert``."""
    from worldloom.data.conversion import convert

    given = _parse("convert", "Write a dataset as a folder that is streamed fastest.", _CONVERT, words)
    if "to" not in given:
        raise ConfigError("worldloom data convert needs --to FOLDER.")
    dataset = open_dataset(given["spec"], given)
    folder = convert(dataset, given["to"], progress=_bar("Converting episodes"))
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{len(dataset):,} rows of {dataset.num_episodes:,} episodes, {size / 1e6:,.1f} MB, in {folder}")
    print(f"Next: worldloom train --model tdmpc2:tiny --data {given['to']}")
    return 0


def _parse(name: str, about: str, own: list[Flag], words: Sequence[str]) -> dict[str, Any]:
    flags = FlagParser(f"data {name}", about, argument="spec", argument_help="path, or FORMAT:path, or minari:ID")
    flags.group("options", [*own, *DATA_OPTIONS])
    return flags.parse(words)


def _text(found: Any) -> str:
    """The findings as lines."""
    dataset, returns, lengths = found.dataset, found.returns[np.isfinite(found.returns)], found.lengths
    read = len(found.episodes)
    some = "" if read == dataset.num_episodes else f" ({read:,} of them read)"
    lines = [
        f"format        {dataset.kind}: {KINDS[dataset.kind]}",
        f"observations  {dataset.obs_shape}"
        + "".join(f"; {name} in {low:.4g} … {high:.4g}" for name, (low, high) in found.obs_range.items()),
        f"actions       {dataset.action_dim} {dataset.action_type}{_actions(found)}",
        f"episodes      {dataset.num_episodes:,}{some}, {len(dataset):,} rows",
        f"lengths       {_spread(lengths)} steps",
        f"returns       {_spread(returns)}; rewards in {found.reward_range[0]:.4g} … {found.reward_range[1]:.4g}"
        if len(returns)
        else "returns       none could be read",
        f"ends          {int(found.terminal.sum()):,} terminal, {int((~found.terminal).sum()):,} cut",
    ]
    if found.tasks:
        lines.append("tasks         " + ", ".join(f"{task}: {count:,}" for task, count in found.tasks.items()))
    lines += [f"note          {note}" for note in found.notes]
    more = found.unreadable - len(found.problems)
    lines += [f"problem       {problem}" for problem in found.problems]
    lines += [f"problem       and {more:,} more episodes"] if more > 0 else []
    return "\n".join(lines + ([] if found.unreadable else ["problems      none"]))


def _actions(found: Any) -> str:
    if not found.action_range:
        return ""
    if found.dataset.action_type == "discrete":
        counts = np.asarray(found.action_range["counts"])
        return "; used " + ", ".join(f"{each / max(counts.sum(), 1):.0%}" for each in counts[:20])
    low, high = found.action_range["actions"]
    return f" in {low:.4g} … {high:.4g}"


def _spread(values: np.ndarray) -> str:
    if not len(values):
        return "none"
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    same = f"{middle:,.4g}"
    return same if low == high else f"{low:,.4g} … {high:,.4g}, median {same}"


def _slug(spec: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", spec).strip("-").lower()[-60:] or "dataset"


def _bar(text: str) -> Any:
    from tqdm.auto import tqdm

    return lambda items: tqdm(items, desc=text, leave=False)
