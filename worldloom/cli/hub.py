"""``worldloom push`` and ``worldloom pull``: models on the Hugging Face hub."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from worldloom.cli.flags import FAMILY_FLAG, Flag, FlagParser
from worldloom.errors import ConfigError
from worldloom.export.publishing import push_to_hub, save_with_card
from worldloom.files import absolute_path
from worldloom.models import pretrained
from worldloom.models.registry import list_models

_PUSH = [
    Flag("repo", str, "Repository, owner/name."),
    Flag("to", str, "Folder to write instead: weights, card, curve and video."),
    Flag("licence", str, "Licence of the weights.", "apache-2.0", aliases=("license",)),
    Flag("private", bool, "Make a new repository private."),
    Flag("checkpoint", str, "latest, best (by evaluation return), or a number of updates."),
    FAMILY_FLAG,
]
_PULL = [
    Flag("to", str, "Folder to copy the files to; without it they stay in the cache."),
    Flag("revision", str, "Branch, tag or commit."),
    Flag("local_files_only", bool, "Use what was downloaded before; never access the network."),
]


def push(words: Sequence[str]) -> int:
    """Upload the model of a run with its card, or write both to a folder."""
    flags = FlagParser("push", "The model of a run with its card.", argument="run", argument_help="folder of the run")
    flags.group("options", _PUSH)
    given = flags.parse(words)
    if ("repo" in given) == ("to" in given):
        raise ConfigError("worldloom push needs either --repo OWNER/NAME or --to FOLDER.")
    step = given.get("checkpoint")
    checkpoint = int(step) if step and step.isdecimal() else step
    licence = given.get("licence", "apache-2.0")
    if "to" in given:
        print(save_with_card(given["run"], given["to"], licence=licence, checkpoint=checkpoint))
        return 0
    options = {"licence": licence, "private": given.get("private", False), "checkpoint": checkpoint}
    print(push_to_hub(given["run"], given["repo"], **options))
    return 0


def pull(words: Sequence[str]) -> int:
    """Download a model."""
    flags = FlagParser("pull", "Download a model.", argument="repo", argument_help="repository, owner/name")
    flags.group("options", _PULL)
    given = flags.parse(words)
    repo = given["repo"]
    if not pretrained.is_repository(repo):
        raise ConfigError(f"'{repo}' is not the name of a repository: owner/name.")
    target = absolute_path(given["to"]) if "to" in given else None
    if target is not None and (target.is_file() or (target.is_dir() and any(target.iterdir()))):
        raise ConfigError(f"{target} holds something already; choose a folder that is not there or is empty.")
    options = {name: given[name] for name in ("revision", "local_files_only") if name in given}
    folder = pretrained.download(repo, known=list_models(), **options)
    saved = pretrained.read_model(folder)
    if target is not None:
        # Downloaded files are links into the cache.
        shutil.copytree(folder, target, dirs_exist_ok=True, symlinks=False)
    path = Path(folder if target is None else target)
    print(f"{saved.config.get('model_type')} of {repo}, {len(saved.arrays)} arrays, in {path}")
    name = repo if target is None else given["to"]
    print(f"Next: worldloom.load_policy('{name}'), or create_world_model('{name}').")
    return 0
