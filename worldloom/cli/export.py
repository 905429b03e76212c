"""``worldloom export``: the policy of a run as a file."""

from __future__ import annotations

import inspect
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from worldloom import policy_file
from worldloom.acting.loading import load_model
from worldloom.cli.flags import FAMILY_FLAG, Flag, FlagParser
from worldloom.errors import ConfigError
from worldloom.export import export_policy
from worldloom.files import write_atomically

_FLAGS = [
    Flag("to", str, "File to write.", "policy.worldloom"),
    Flag("checkpoint", str, "latest, best (by evaluation return), or a number of updates."),
    Flag("num_envs", int, "Environments that the file acts in together; by default any number."),
    Flag("planner", Mapping, 'How much is planned, such as {"num_samples": 128, "iterations": 2}.'),
    Flag("platforms", str, "Where it shall run, of cpu, cuda, rocm and tpu.", "cpu,cuda,tpu"),
    Flag("precision", str, "float32 or bfloat16; by default that of the model on this machine."),
    Flag("with_reader", bool, "Also write policy_file.py, which acts by the file, beside it."),
    FAMILY_FLAG,
]


def export(words: Sequence[str]) -> int:
    """Write the policy of a run, or of a saved model, to a file."""
    flags = FlagParser(
        "export",
        "The policy of a run as a file that acts without worldloom.",
        argument="folder",
        argument_help="folder of the run, or of a saved model",
    )
    flags.group("options", _FLAGS)
    given = flags.parse(words)
    path = Path(given.get("to", "policy.worldloom"))
    if path.is_dir():
        raise ConfigError(f"--to is the file to write, such as {path / 'policy.worldloom'}; {path} is a folder.")
    if not path.parent.is_dir():
        raise ConfigError(f"--to {path}: there is no folder {path.parent}.")
    step = given.get("checkpoint")
    model = load_model(given["folder"], int(step) if step and step.isdecimal() else step)
    if model.env_spaces is None:
        print(f"{given['folder']} does not say which environment it was trained in: actions will be in [-1, 1].")
    export_policy(
        model,
        path,
        num_envs=given.get("num_envs"),
        planner=given.get("planner"),
        platforms=given.get("platforms", "cpu,cuda,tpu").replace(" ", "").split(","),
        precision=given.get("precision"),
    )
    reader = path.parent / "policy_file.py"
    if given.get("with_reader"):
        write_atomically(reader, inspect.getsource(policy_file))
    with zipfile.ZipFile(path) as archive:
        manifest = json.loads(archive.read("manifest.json"))
        weights = sum(info.file_size for info in archive.infolist() if info.filename.startswith("weights/"))
    size = path.stat().st_size
    print(
        f"{path}: {size:,} bytes, of which weights {weights:,}; {', '.join(manifest['programs'])} for "
        f"{', '.join(manifest['platforms'])} in {manifest['precision']}, any JAX that reads calling convention "
        f"{manifest['calling_convention_version']} (written with {manifest['jax']})."
    )
    source = reader if given.get("with_reader") else inspect.getfile(policy_file)
    print(f"Act by it: worldloom.load_policy('{path}'), or without worldloom load_policy of {source}.")
    return 0
