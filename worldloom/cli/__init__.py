"""The command line: ``worldloom COMMAND …``, or ``python -m worldloom COMMAND …``.

What was asked for wrongly is answered with one sentence on stderr and exit code 2, a failing disk with 1; Ctrl-C ends
with 130 and SIGTERM with 143, after training has saved. Commands are imported when they are called.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from worldloom.config import nearest
from worldloom.errors import WorldloomError

COMMANDS = {
    "train": ("worldloom.cli.train:train", "train an agent in an environment, or go on with a run"),
    "eval": ("worldloom.cli.runs:evaluate", "returns of the evaluation policy of a run"),
    "play": ("worldloom.cli.runs:film", "a video of the evaluation policy of a run"),
    "list": ("worldloom.cli.about:names", "names of models and kinds of environments"),
    "info": ("worldloom.cli.about:info", "parameters of a model, and memory for training it"),
    "doctor": ("worldloom.cli.about:doctor", "what JAX sees, what is missing for a GPU, versions, extras"),
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
    _prepare()
    from worldloom.cli.flags import take_family_modules

    if words[0] in ("train", "eval", "play"):
        _keep_compiled_programs()
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
        # Whoever read the output (head, less) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(str(error), code=1)
    except KeyboardInterrupt:
        return 130


def _prepare() -> None:
    """What a program may set that a library may not."""
    # Gymnasium's classic environments draw with pygame, which greets and looks for a screen.
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    logger = logging.getLogger("worldloom")
    if not logger.handlers:
        logger.addHandler(_AboveTheBar())
        logger.setLevel(logging.INFO)
    # Some dependency gives the root logger a handler of its own, which would say everything again.
    logger.propagate = False


def _keep_compiled_programs() -> None:
    from worldloom.devices import keep_compiled_programs
    from worldloom.models.pretrained import default_cache_dir

    keep_compiled_programs(default_cache_dir() / "compiled")


class _AboveTheBar(logging.Handler):
    """Messages on stderr that do not tear a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm.auto import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def _fail(sentence: str, code: int = 2) -> int:
    print(f"worldloom: {' '.join(sentence.split())}", file=sys.stderr)
    return code
