"""The command line: ``worldloom COMMAND …``, or ``python -m worldloom COMMAND …``.

Exit codes: 2 for a user error (one sentence on stderr), 1 for a failing disk, 130 after Ctrl-C and 143 after SIGTERM,
both once training has saved a checkpoint. Commands are imported when they are called.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence

from worldloom.config import nearest
from worldloom.errors import WorldloomError

COMMANDS = {
    "train": ("worldloom.cli.train:train", "train an agent in an environment, or resume a run"),
    "eval": ("worldloom.cli.runs:evaluate", "evaluate the policy of a run and print its returns"),
    "play": ("worldloom.cli.runs:play_video", "write a video of the evaluation policy of a run"),
    "export": ("worldloom.cli.export:export", "write the policy of a run to a file that acts without worldloom"),
    "push": ("worldloom.cli.hub:push", "upload the model of a run with its card, or write both to a folder"),
    "pull": ("worldloom.cli.hub:pull", "download a model from the Hugging Face hub"),
    "data": ("worldloom.cli.data:data", "look into a recorded dataset, or convert it for streaming"),
    "score": ("worldloom.cli.score:score", "print the published statistic of runs, with its spread over seeds"),
    "list": ("worldloom.cli.about:names", "list model names, kinds of environments, and published experiments"),
    "info": ("worldloom.cli.about:info", "show parameters of a model and the memory that training needs"),
    "doctor": (
        "worldloom.cli.about:doctor",
        "check devices, versions and extras, or what a run has seen of rewards",
    ),
}

USAGE = """usage: worldloom COMMAND [options]

{commands}

  worldloom train --model tdmpc2:tiny --env Pendulum-v1 --steps 10000
  worldloom COMMAND --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:8} {about}" for name, (_, about) in COMMANDS.items())
        print(USAGE.format(commands=lines), end="")
        return 0
    if words[0] == "--version":
        from worldloom import __version__

        print(f"worldloom {__version__}")
        return 0
    if words[0] not in COMMANDS:
        return _fail(
            f"There is no command '{words[0]}'.{nearest(words[0], COMMANDS)} There are: {', '.join(COMMANDS)}."
        )
    _configure_process()
    from worldloom.cli.flags import take_family_modules

    if words[0] in ("train", "eval", "play", "export"):
        _enable_compilation_cache()
    try:
        rest, modules = take_family_modules(words[1:])
        for name in modules:
            from worldloom.families import import_family_module

            import_family_module(name)
        module, function = COMMANDS[words[0]][0].split(":")
        return getattr(importlib.import_module(module), function)(rest)
    except WorldloomError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The reader of the output (head, less) has closed it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(str(error), code=1)
    except KeyboardInterrupt:
        return 130


def _configure_process() -> None:
    """Process-wide settings that a program may make and a library may not."""
    # Names of files and environments may hold what the terminal's encoding does not.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # Gymnasium's classic environments render with pygame, which prints a greeting and needs a display.
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    logger = logging.getLogger("worldloom")
    if not logger.handlers:
        logger.addHandler(_TqdmHandler())
        logger.setLevel(logging.INFO)
    # A dependency adds a handler to the root logger, which would print every message twice.
    logger.propagate = False


def _enable_compilation_cache() -> None:
    from worldloom.devices import keep_compiled_programs
    from worldloom.models.pretrained import default_cache_dir

    keep_compiled_programs(default_cache_dir() / "compiled")


class _TqdmHandler(logging.Handler):
    """Writes messages to stderr above a progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm.auto import tqdm

        # A terminal that was closed must not end training; nothing is left to say so on.
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(self.format(record), file=sys.stderr)


def _fail(sentence: str, code: int = 2) -> int:
    print(f"worldloom: {' '.join(sentence.split())}", file=sys.stderr)
    return code
