"""``worldloom eval`` and ``worldloom play``: evaluation and video of a trained run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.cli.flags import FAMILY_FLAG, Flag, FlagParser
from worldloom.devices import keep_freed_memory
from worldloom.errors import ConfigError
from worldloom.models.registry import saved_class
from worldloom.report.video import save_gif
from worldloom.training.checkpoint import load_weights
from worldloom.training.evaluation import play
from worldloom.training.run_folder import RunFolder

_FLAGS = [
    Flag("episodes", int, "How many to play.", 10),
    Flag("checkpoint", str, "latest, best (by evaluation return), or a number of updates.", "latest"),
    Flag("seed", int, "Seed of the episodes and of the policy.", 0),
    Flag("num_envs", int, "Environments stepped together; by default as many as episodes, at most 10."),
    Flag("explore", bool, "Act as during collection, with exploration."),
    Flag("greedy", bool, "Let every draw of the policy take its mode."),
    Flag("env", str, "Another environment with the same shapes."),
    Flag("device", str, "auto, cpu, cuda, gpu or tpu, or a numbered one such as cuda:1.", "auto"),
    FAMILY_FLAG,
]


def evaluate(words: Sequence[str]) -> int:
    """Print the returns of the evaluation policy of a run."""
    flags = FlagParser(
        "eval", "Returns of the evaluation policy of a run.", argument="folder", argument_help="folder of the run"
    )
    flags.group("options", _FLAGS)
    given = flags.parse(words)
    episodes, seed = given.get("episodes", 10), given.get("seed", 0)
    with _open_run(given, given.get("num_envs", min(episodes, 10))) as (model, env, step):
        ends = play(model, env, episodes=episodes, seed=seed, **_acting(given))
    returns = np.array([end.episode_return for end in ends])
    lengths = np.array([end.length for end in ends])
    print(
        f"return {returns.mean():.1f} ± {returns.std():.1f} (from {returns.min():.1f} to {returns.max():.1f}), "
        f"length {lengths.mean():.1f}, {sum(end.terminated for end in ends)} of {len(ends)} episodes terminated; "
        f"weights after {step:,} updates"
    )
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
    path = Path(given.get("video") or Path(given["folder"]) / "play.gif")
    if path.suffix.lower() != ".gif":
        raise ConfigError(f"--video writes a GIF: {path.with_suffix('.gif')}, not {path}.")
    frames: list[np.ndarray] = []
    with _open_run(given, 1, render=True) as (model, env, step):
        for episode in range(given.get("episodes", 1)):
            pictures: list[np.ndarray] = []
            seed = given.get("seed", 0) + episode
            (end,) = play(model, env, episodes=1, seed=seed, **_acting(given), frames=pictures)
            frames += pictures
            print(f"return {end.episode_return:.1f}, length {end.length}; weights after {step:,} updates")
    print(f"{save_gif(frames, path, fps=given.get('fps', 25.0))}: {len(frames)} pictures")
    return 0


@contextlib.contextmanager
def _open_run(given: Mapping[str, Any], num_envs: int, *, render: bool = False) -> Iterator[tuple[Any, Any, int]]:
    """Open a run: the model with weights of a checkpoint, new environments, and the number of updates behind them."""
    run, device = RunFolder(given["folder"]), given.get("device", "auto")
    settings = run.settings()
    cls = saved_class(settings["model"], settings.get("model_class"), str(run.path))
    keep_freed_memory()
    changes = {"spec": given["env"]} if "env" in given else {}
    parallel = {"parallel": "sync"} if num_envs == 1 else {}
    with run.make_env(num_envs=num_envs, seed=given.get("seed", 0), render=render, **parallel, **changes) as env:
        model = cls(cls.config_class.from_dict(settings["model"]), device=device)
        yield model, env, load_weights(model, run.checkpoints, _parse_checkpoint(given.get("checkpoint", "latest")))


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
