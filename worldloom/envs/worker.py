"""The process of one subprocess environment: builds it, then answers requests until the pipe closes.

Imported by a bare interpreter (see :mod:`worldloom.envs.workers`), so nothing here may import JAX.

Answers are ``(kind, value)``: ``"ready"`` with (observation space, action space, time limit) once at the start, then
one answer per request: ``"row"`` with an ``Arrival``, ``"frame"`` with a picture (or why there is none), or
``"error"`` with (sentence, exception or ``None``), after which the process ends: an environment that raised is in no
known state.
"""

from __future__ import annotations

import contextlib
import pickle
import traceback
from multiprocessing.connection import Connection
from typing import Any

from worldloom.envs.player import Player
from worldloom.errors import EnvError


def main(file_descriptor: int) -> None:
    """Serve the parent at the other end of a socket. Returns when it closes its end, dies, or an error was sent."""
    connection = Connection(file_descriptor)
    player = None
    try:
        player = Player(pickle.loads(connection.recv_bytes())())
        answer: tuple[str, Any] = ("ready", (player.env.observation_space, player.env.action_space, player.time_limit))
        while True:
            connection.send(answer)
            try:
                request, arguments = connection.recv()
            except (EOFError, ConnectionResetError):
                break
            answer = _answer(player, request, arguments)
    except BaseException as error:
        with contextlib.suppress(OSError):
            connection.send(("error", (_sentence(error), _picklable(error))))
    finally:
        if player is not None:
            player.env.close()
        connection.close()


def _answer(player: Player, request: str, arguments: Any) -> tuple[str, Any]:
    if request == "step":
        return "row", player.step(arguments)
    if request == "reset":
        return "row", player.reset(arguments)
    if request == "replay":
        return "row", player.replay(*arguments)
    try:
        return "frame", player.env.render()
    except Exception as error:  # A picture less does no harm to the episode.
        return "frame", _picklable(error) or EnvError(_sentence(error))


def _sentence(error: BaseException) -> str:
    return f"raised {type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}".rstrip()


def _picklable(error: BaseException) -> BaseException | None:
    """The exception itself if it survives the way, so that the parent can raise what the environment raised."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return None
