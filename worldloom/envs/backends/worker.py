"""The process of one subprocess environment: builds it, then answers requests until the pipe is closed.

Imported by a bare interpreter (see :mod:`worldloom.envs.backends.subproc`), so nothing here may import JAX.

Requests are ``(name, arguments)``, answers are ``(kind, value)``:

=================  ======================  ==================================================================
request            arguments               answer
=================  ======================  ==================================================================
(none, at start)                           ``"ready"``, (observation space, action space, time limit)
``reset``          seed                    ``"result"``, ``StepResult``
``step``           action                  ``"result"``, ``StepResult``
``replay_actions`` seed, actions, length   ``"result"``, ``StepResult``
``render``                                 ``"frame"``, what ``render`` returned, or the exception that it raised
=================  ======================  ==================================================================

An ``EnvContractError`` is answered with ``"contract"``, the sentence: a new process would do the same. Any other
exception is answered with ``"error"``, (sentence, exception or ``None``), and ends the process: after it the
environment may be in any state.
"""

from __future__ import annotations

import contextlib
import pickle
import traceback
from multiprocessing.connection import Connection
from typing import Any

from worldloom.envs.backends.single import SingleEnv
from worldloom.errors import EnvContractError, EnvError


def main(file_descriptor: int) -> None:
    """Serve the parent over a socket. Returns when the parent closes its end or dies, or after an error was sent."""
    connection = Connection(file_descriptor)
    single = None
    try:
        single = SingleEnv(pickle.loads(connection.recv_bytes())())
        answer: tuple[str, Any] = ("ready", (single.env.observation_space, single.env.action_space, single.time_limit))
        while True:
            connection.send(answer)
            try:
                request, arguments = connection.recv()
            except (EOFError, ConnectionResetError):
                break
            answer = _answer(single, request, arguments)
    except EnvContractError as error:
        with contextlib.suppress(OSError):
            connection.send(("contract", str(error)))
    except BaseException as error:
        with contextlib.suppress(OSError):
            connection.send(("error", (_sentence(error), _if_picklable(error))))
    finally:
        if single is not None:
            single.env.close()
        connection.close()


def _answer(single: SingleEnv, request: str, arguments: Any) -> tuple[str, Any]:
    if request == "step":
        return "result", single.step(arguments)
    if request == "reset":
        return "result", single.reset(arguments)
    if request == "replay_actions":
        return "result", single.replay_actions(*arguments)
    try:
        return "frame", single.env.render()
    except Exception as error:  # The episode does not depend on the frame, so it continues.
        return "frame", _if_picklable(error) or EnvError(_sentence(error))


def _sentence(error: BaseException) -> str:
    return f"raised {type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}".rstrip()


def _if_picklable(error: BaseException) -> BaseException | None:
    """The exception itself if it survives pickling, so that the parent can raise what the environment raised."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return None
