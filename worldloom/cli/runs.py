"""``worldloom eval`` and ``worldloom play``: evaluation and video of a trained run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.acting.loading import load_run_model
from worldloom.cli.flags import FAMILY_FLAG, Flag, FlagParser
from worldloom.cli.train import ENV_FLAGS
from worldloom.config import as_integer
from worldloom.devices import keep_freed_memory
from worldloom.errors import ConfigError
from worldloom.families import import_from_current_folder
from worldloom.files import absolute_path
from worldloom.report.video import save_gif
from worldloom.training.evaluation import play
from worldloom.training.run_folder import RunFolder
from worldloom.training.task_evaluation import evaluate_tasks

_log = logging.getLogger("worldloom")

_TRANSLATION = ("action_bounds", "drop_keys", "join_actions", "on_bad_step")
"""Flags of ``worldloom train`` about the environment's spaces; runs of earlier versions do not have them."""
_FLAGS = [
    Flag("episodes", int, "How many to play.", 10),
    Flag("checkpoint", str, "latest, best (by evaluation return), or a number of updates.", "latest"),
    Flag("seed", int, "Seed of the episodes and of the policy.", 0),
    Flag("num_envs", int, "Environments stepped together; by default as many as episodes, at most 10."),
    Flag("explore", bool, "Act as during collection, with exploration."),
    Flag("greedy", bool, "Let every draw of the policy take its mode."),
    Flag("env", str, "Another environment with the same shapes."),
    *(flag for flag in ENV_FLAGS if flag.name in _TRANSLATION),
    Flag("trust", bool, "Import the module of the run's environment (module:Id), which runs its code."),
    Flag("max_steps", int, "Decision steps at which an episode is cut; by default the environment's own limit."),
    Flag("device", str, "auto, cpu, cuda, gpu or tpu, or a numbered one such as cuda:1.", "auto"),
    FAMILY_FLAG,
]


def evaluate(words: Sequence[str]) -> int:
    """Print the returns of the evaluation policy of a run."""
    flags = FlagParser(
        "eval", "Returns of the evaluation policy of a run.", argument="folder", argument_help="folder of the run"
    )
    flags.group("options", [*_FLAGS, Flag("tasks", str, "Of a multitask model: names or numbers of tasks.", words="+")])
    given = flags.parse(words)
    episodes, seed = as_integer("--episodes", given.get("episodes", 10)), given.get("seed", 0)
    settings = RunFolder(given["folder"]).settings()
    if settings["env"] is None and "env" not in given and settings["model"].get("num_tasks"):
        return _evaluate_tasks(given, episodes, seed)
    if "tasks" in given:
        raise ConfigError("--tasks is for runs of multitask models.")
    with _open_run(given, given.get("num_envs", min(episodes, 10))) as (model, env, step, limit):
        _announce(given, step, f"playing {episodes} episodes of at most {limit:,} steps")
        ends = play(model, env, episodes=episodes, seed=seed, **_acting(given), max_steps=limit)
    returns = np.array([end.episode_return for end in ends])
    lengths = np.array([end.length for end in ends])
    print(
        f"return {returns.mean():.1f} ± {returns.std():.1f} (from {returns.min():.1f} to {returns.max():.1f}), "
        f"length {lengths.mean():.1f}, {sum(end.terminated for end in ends)} of {len(ends)} episodes terminated; "
        f"weights after {step:,} updates"
    )
    return 0


def _evaluate_tasks(given: Mapping[str, Any], episodes: int, seed: int) -> int:
    """Print the returns and scores of a multitask model by task."""
    for name in ("explore", "greedy", "num_envs", "max_steps", *_TRANSLATION):
        if name in given:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for runs in one environment; the tasks of a multitask model are played "
                "as their benchmark does."
            )
    checkpoint = _parse_checkpoint(given.get("checkpoint", "latest"))
    model, step = load_run_model(RunFolder(given["folder"]), checkpoint, given.get("device", "auto"))
    scores = []
    for result in evaluate_tasks(model, tasks=given.get("tasks"), episodes=episodes, seed=seed):
        scores.append(result.score)
        returns = f"return {result.returns.mean():8.1f} ± {result.returns.std():6.1f}"
        print(f"{result.task.name:26} {returns}   score {result.score:5.1f}", flush=True)
    if not scores:
        raise ConfigError("None of the tasks has an environment here; pip install 'worldloom[envs]' brings dm_control.")
    print(f"mean score {np.mean(scores):.1f} of {len(scores)} tasks; weights after {step:,} updates")
    return 0


def play_video(words: Sequence[str]) -> int:
    """Write a video of the evaluation policy of a run."""
    flags = FlagParser(
        "play", "A video of the evaluation policy of a run.", argument="folder", argument_help="folder of the run"
    )
    video = [
        Flag("video", str, "GIF file to write.", "FOLDER/play.gif"),
        Flag("fps", float, "Frames per second, at most 50.", 25.0),
    ]
    kept = [flag for flag in _FLAGS if flag.name not in ("episodes", "num_envs")]
    flags.group("options", [*video, Flag("episodes", int, "How many to play, one after another.", 1), *kept])
    given = flags.parse(words)
    path = absolute_path(given.get("video") or Path(given["folder"]) / "play.gif")
    if path.suffix.lower() != ".gif":
        raise ConfigError(f"--video writes a GIF: {path.with_suffix('.gif').name}, not {path.name}.")
    frames: list[np.ndarray] = []
    with _open_run(given, 1, render=True) as (model, env, step, limit):
        _announce(given, step, f"filming an episode of at most {limit:,} steps")
        options = {**_acting(given), "max_steps": limit}
        for episode in range(given.get("episodes", 1)):
            pictures: list[np.ndarray] = []
            seed = given.get("seed", 0) + episode
            (end,) = play(model, env, episodes=1, seed=seed, frames=pictures, **options)
            frames += pictures
            print(f"return {end.episode_return:.1f}, length {end.length}; weights after {step:,} updates")
    print(f"{save_gif(frames, path, fps=given.get('fps', 25.0))}: {len(frames)} pictures")
    return 0


@contextlib.contextmanager
def _open_run(given: Mapping[str, Any], num_envs: int, *, render: bool = False) -> Iterator[tuple[Any, Any, int, int]]:
    """Open a run: the model with weights of a checkpoint, new environments, the number of updates behind the weights,
    and the decision steps at which an episode is cut."""
    run, device = RunFolder(given["folder"]), given.get("device", "auto")
    if "env" in given or given.get("trust"):
        import_from_current_folder()
    keep_freed_memory()
    changes = {"spec": given["env"]} if "env" in given else {}
    changes |= {name: given[name] for name in _TRANSLATION if name in given}
    parallel = {"parallel": "sync"} if num_envs == 1 else {}
    options = {"num_envs": num_envs, "seed": given.get("seed", 0), "render": render, **parallel, **changes}
    with run.make_env(trust=given.get("trust", False), **options) as env:
        model, step = load_run_model(run, _parse_checkpoint(given.get("checkpoint", "latest")), device)
        limit = given.get("max_steps") or env.episode_length or run.training_config().max_episode_steps
        yield model, env, step, limit


def _announce(given: Mapping[str, Any], step: int, what: str) -> None:
    """Say on stderr what is done, because the policy is compiled first, which takes a while."""
    _log.info("%s: %s with the weights after %s updates.", RunFolder(given["folder"]).title(), what, f"{step:,}")


def _acting(given: Mapping[str, Any]) -> dict[str, Any]:
    """How to act, as arguments of ``play``."""
    return {name: given.get(name, False) for name in ("explore", "greedy")}


def _parse_checkpoint(text: str) -> str | int:
    """The value of ``--checkpoint``: ``latest``, ``best`` or a number of updates."""
    if text in ("latest", "best"):
        return text
    if not text.isdecimal():
        raise ConfigError(f"--checkpoint is latest, best or a number of updates, not '{text}'.")
    return int(text)
