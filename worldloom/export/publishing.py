"""A run as a folder to share: weights, card, curve and video; and its way to a hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worldloom.acting.loading import load_model
from worldloom.config import check
from worldloom.errors import ConfigError, FileFormatError
from worldloom.files import absolute_path, make_folder, write_atomically
from worldloom.models import pretrained
from worldloom.models.card import CARD_FILE, Card, Result
from worldloom.report.curves import read_records
from worldloom.training.run_folder import RunFolder

_PICTURES = {"learning_curve.png": "Learning curve", "eval.gif": "An evaluation episode"}


def save_with_card(
    run: str | Path,
    folder: str | Path,
    *,
    name: str | None = None,
    licence: str = "apache-2.0",
    checkpoint: str | int | None = None,
) -> Path:
    """Write the model of a run, with its card, curve and video, to ``folder``, and return that.

    The card, ``README.md``, has the metadata that the Hugging Face hub reads, the newest evaluation as a result, the
    protocol, all settings and the versions.

    Args:
      run: folder of the run.
      folder: where to write; files of an earlier model there are replaced.
      name: name in the card; None is the folder's.
      licence: identifier of the licence of the weights.
      checkpoint: see ``load_policy``.

    Raises:
      ConfigError: ``folder`` holds a run.
      FileFormatError: ``run`` is not the folder of a run, or damaged. Others as ``load_policy``.
    """
    source, target = RunFolder(run), absolute_path(folder)
    if RunFolder(target).checkpoints.is_dir():
        raise ConfigError(f"{target} is the folder of a run; choose another one.")
    settings = source.settings()
    model = load_model(source.path, checkpoint)
    make_folder(target)
    pictures = {}
    for file, title in _PICTURES.items():
        (target / file).unlink(missing_ok=True)
        if (source.path / file).is_file():
            shutil.copyfile(source.path / file, target / file)
            pictures[title] = file
    model.save_pretrained(target)
    env = settings.get("env") or {}
    data = settings.get("data") or {}
    card = Card(
        name or target.name,
        model.config.to_dict(),
        model.num_parameters(),
        licence=licence,
        env=env.get("spec") or env.get("made_of") or (_public(str(data["data"])) if data else None),
        results=_results(source, str(env.get("spec") or env.get("made_of"))) if env else [],
        training={**settings["training"], "env": env or None, "data": _public(str(data["data"])) if data else None},
        protocol=settings.get("protocol"),
        versions=_versions(source.path / "versions.json"),
        pictures=pictures,
    )
    write_atomically(target / CARD_FILE, card.text())
    return target


def push_to_hub(
    run: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool = False,
    licence: str = "apache-2.0",
    checkpoint: str | int | None = None,
) -> str:
    """Upload the model of a run with its card to a Hugging Face repository, and return its address (extra ``hub``).

    Args:
      run: folder of the run.
      repo_id: ``"owner/name"``.
      token: access token; None is that of the machine's login.
      private: whether a new repository is private.
      licence, checkpoint: see :func:`save_with_card`.

    Raises:
      MissingDependencyError: the extra is not installed.
      ConfigError: ``repo_id`` is not of that form.
      UnknownModelError: the hub refuses. Others as :func:`save_with_card`.
    """
    check(pretrained.is_repository(repo_id), f"'{repo_id}' is not the name of a repository: owner/name.")
    client = pretrained.hub()
    with tempfile.TemporaryDirectory() as folder:
        path = save_with_card(run, Path(folder) / "model", name=repo_id, licence=licence, checkpoint=checkpoint)
        return pretrained.upload(client, repo_id, path, token=token, private=private)


def _results(run: RunFolder, env: str) -> list[Result]:
    """The newest evaluation of a run."""
    path = run.path / "metrics.jsonl"
    records = read_records(path) if path.is_file() else []
    found = [record for record in records if isinstance(record.get("eval/return"), int | float)]
    if not found:
        return []
    last, episodes = found[-1], run.training_config().eval_episodes
    mean, std = float(last["eval/return"]), float(last.get("eval/return_std") or 0)
    return [Result(env, mean, std, int(last.get("env_steps") or 0), episodes)]


def _versions(path: Path) -> Mapping[str, Any]:
    """The packages and the device of the newest start of a run."""
    try:
        starts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except ValueError as error:
        raise FileFormatError(f"{path} is damaged: {error}.") from error
    newest = starts[-1] if isinstance(starts, list) and starts and isinstance(starts[-1], dict) else {}
    return {name: newest[name] for name in ("packages", "device") if name in newest}


def _public(spec: str) -> str:
    """What others may know of where data are: an id, or the last part of a path."""
    kind, colon, place = spec.rpartition(":")
    return spec if kind == "minari" else f"{kind}{colon}{Path(place).name}"
