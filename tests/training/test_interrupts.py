"""Ctrl-C and SIGTERM: the first saves and exits with the right code, a second exits at once."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from toy_family import ToyConfig, ToyWorldModel

from worldloom.training import Trainer
from worldloom.training.callbacks import CheckpointCallback

SCRIPT = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import os, signal
from toy_family import *
from worldloom.training import *
from worldloom.training.callbacks import *
folder, number, times = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
signal.signal(number, signal.SIG_DFL)  # nohup has SIGHUP ignored
if number == signal.SIGINT:
    signal.signal(number, signal.default_int_handler)

def interrupt(info):
    if info.step == 7:
        for _ in range(times):
            os.kill(os.getpid(), number)

config = TrainingConfig(batch_size=4, sequence_length=5, device="cpu")
Trainer(ToyWorldModel(ToyConfig()), config, [(1, interrupt), CheckpointCallback(folder)]).train(
    fill(ReplayBuffer(10_000)), total_steps=10**9
)
"""


@pytest.fixture(autouse=True)
def _default_sigint_handler():
    """A background process of a shell ignores SIGINT, and the trainer would too."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def run(folder, number, times):
    command = [sys.executable, "-c", SCRIPT, str(folder), str(int(number)), str(times)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_sigterm_and_sighup_save_and_exit_with_their_codes(tmp_path, number, code):
    ended = run(tmp_path, number, 1)
    assert ended.returncode == code
    assert "Stopping once this update is done" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["7"]


def test_a_second_sigterm_exits_at_once(tmp_path):
    assert run(tmp_path, signal.SIGTERM, 2).returncode == -signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_ctrl_c_saves_and_restores_the_handlers(buffer, config, model, tmp_path):
    previous = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    callback = CheckpointCallback(str(tmp_path))
    interrupt = (5, lambda info: os.kill(os.getpid(), signal.SIGINT))
    trainer = Trainer(model, config, [interrupt, callback])
    with pytest.raises(KeyboardInterrupt):
        trainer.train(buffer)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == previous
    assert trainer.step == 5
    assert callback.checkpointer.steps() == [5]
    again = ToyWorldModel(ToyConfig())
    trainer = Trainer(again, config, [CheckpointCallback(str(tmp_path))])
    trainer.train(buffer, resume="auto", total_steps=6)
    assert trainer.step == 6


def test_a_second_ctrl_c_does_not_wait_for_the_save(buffer, config, model, tmp_path):
    def interrupt(info):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Trainer(model, config, [(5, interrupt), CheckpointCallback(str(tmp_path))]).train(buffer)
    assert not list(tmp_path.iterdir())


def test_handlers_of_the_program_are_not_replaced(buffer, config, model):
    received = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        Trainer(model, config, [(5, lambda info: os.kill(os.getpid(), signal.SIGTERM))]).train(buffer)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert received == [signal.SIGTERM] * 4


def test_training_in_a_thread_installs_no_handlers(buffer, config, model):
    handlers = []
    callbacks = [(4, lambda info: handlers.append(signal.getsignal(signal.SIGINT)))]
    thread = threading.Thread(target=lambda: Trainer(model, config, callbacks).train(buffer))
    thread.start()
    thread.join()
    assert set(handlers) == {signal.getsignal(signal.SIGINT)}
