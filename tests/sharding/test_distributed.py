"""What processes tell each other, as far as one process shows it."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from worldloom import ConfigError, distributed
from worldloom.cli import main
from worldloom.envs import make_env
from worldloom.envs.across_processes import _join, _pack, _unpack, across_processes
from worldloom.envs.backends.base import BatchedStepResult
from worldloom.envs.time_step import WorkerRestart
from worldloom.errors import CheckpointError, WorldloomError


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("localhost:1",), "together"),
        ((None, 2, None), "together"),
        (("localhost:1", 2, 2), "from 0 to 1"),
        (("localhost:1", 2, -1), "from 0 to 1"),
        (("localhost:1", 0, 0), "at least 1"),
    ],
)
def test_processes_that_cannot_be_connected_are_refused_before_jax_is_asked(arguments, says):
    with pytest.raises(ConfigError, match=says):
        distributed.initialize(*arguments)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--process-id", "1"], "--process-id only means something with --distributed"),
        (["--distributed"], "needs --run FOLDER"),
        (["--distributed", "--run", "folder", "--processes", "2"], "together"),
    ],
)
def test_the_command_line_says_what_several_processes_need(flags, says, capsys):
    assert main(["train", "--model", "tdmpc2:tiny", "--env", "Pendulum-v1", *flags]) == 2
    assert says in capsys.readouterr().err


def test_one_process_exchanges_with_itself():
    assert distributed.is_primary()
    assert distributed.Exchange()(b"message") == [b"message"]
    vote = distributed.StopVote()
    assert [vote(stop) for stop in (False, True, False)] == [False, True, False]
    distributed.check_processes({"seed": 1})
    with make_env("CartPole-v1") as env:
        assert across_processes(env) is env


def test_an_error_of_one_process_is_an_error_of_all_that_meet(monkeypatch):
    assert distributed.Meeting()(lambda: 3) == [3]
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def meet(compute, **of_other):
        heard = []

        def tell(self, message):
            heard.append(json.loads(message))
            return iter([message, json.dumps(of_other)])

        monkeypatch.setattr(distributed.Meeting, "_tell", tell)
        return heard, lambda: distributed.Meeting()(compute)

    heard, call = meet(lambda: 3, value=[4])
    assert call() == [3, [4]]
    _, call = meet(lambda: 3, error="its disk is full", **{"class": "CheckpointError"})
    with pytest.raises(CheckpointError, match=r"^Process 1: its disk is full$"):
        call()
    _, call = meet(lambda: 3, error="no space", **{"class": "OSError"})
    with pytest.raises(WorldloomError, match=r"^Process 1: no space$"):
        call()
    heard, call = meet(lambda: 1 // 0, value=4)
    with pytest.raises(ZeroDivisionError):
        call()
    assert heard == [{"error": "integer division or modulo by zero", "class": "ZeroDivisionError"}]


@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 4)), elements={"allow_nan": False}),
    st.integers(0, 5),
    st.dictionaries(st.integers(0, 2), st.dictionaries(st.text(), st.floats(allow_nan=False, width=32))),
)
def test_a_step_arrives_as_it_was_sent_with_environments_numbered_through(obs, first, infos):
    count = len(obs)
    result = BatchedStepResult(
        obs={"a/b": obs, "image": np.full((count, 2, 2, 3), 7, np.uint8)},
        reward=obs[:, 0],
        is_last=obs[:, 0] > 0,
        is_terminal=obs[:, 0] > 1,
        restarts=(WorkerRestart(0, "it died", 2),),
        infos=infos,
    )
    received = _unpack(_pack(result, first))
    for name, value in result.obs.items():
        assert received.obs[name].dtype == value.dtype
        np.testing.assert_array_equal(received.obs[name], value)
    np.testing.assert_array_equal(received.reward, result.reward)
    assert received.restarts == (WorkerRestart(first, "it died", 2),)
    assert received.infos == {env + first: info for env, info in infos.items()}
    both = _join([received, received])
    assert both.obs["a/b"].shape == (2 * count, obs.shape[1])
    np.testing.assert_array_equal(both.is_last, np.concatenate([result.is_last] * 2))
    assert _unpack(_pack(None, first)) is None
