"""Interleaved rows of several environments, checked against a model made of plain lists."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom.errors import DataError
from worldloom.replay import ReplayBuffer
from worldloom.replay.index import FIRST, LAST, TERMINAL, EpisodeIndex
from worldloom.replay.online import add_steps


def row(value, first=False, last=False, terminal=False, stream=0):
    return {"value": value, "first": first, "last": last, "terminal": terminal, "stream": stream}


def add(buffer, *rows):
    """One call of ``add_rows``; the observation is the row's value, the reward its negative."""
    value = np.array([r["value"] for r in rows], np.float32)
    first, last, terminal = (np.array([r[k] for r in rows]) for k in ("first", "last", "terminal"))
    actions = np.where(last, 0, 0.5)[:, None]
    rewards = np.where(first, 0, -value)
    return buffer.add_rows(value[:, None], actions, rewards, first, last, terminal, streams=[r["stream"] for r in rows])


class ListModel:
    """The same rules with plain lists: rows in order of arrival, dropped from the front."""

    def __init__(self, capacity):
        self.capacity, self.rows = capacity, []

    def add(self, *rows):
        for new in rows:
            mine = [r for r in self.rows if r["stream"] == new["stream"]]
            if new["first"] and mine:
                mine[-1]["last"] = True
            self.rows.append(dict(new))
        self.rows = self.rows[-self.capacity :]

    def episodes(self):
        found = []
        for stream in sorted({r["stream"] for r in self.rows}):
            mine = [r for r in self.rows if r["stream"] == stream]
            for n, r in enumerate(mine):
                if n == 0 or r["first"]:
                    found.append([])
                found[-1].append(r)
        return found


@st.composite
def histories(draw):
    """Calls of ``add_rows`` that environments could make, crashes (``first`` out of turn) included."""
    count = draw(st.integers(1, 4))
    in_progress, value, calls = [0] * count, 0, []
    for _ in range(draw(st.integers(1, 25))):
        streams = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True))
        call = []
        for stream in streams:
            age = in_progress[stream]
            first = age == 0 or draw(st.integers(0, 9)) == 0
            last = not first and draw(st.integers(0, 4)) == 0
            call.append(row(value, first, last, last and draw(st.booleans()), stream))
            in_progress[stream] = 0 if last else 1 if first else age + 1
            value += 1
        calls.append(call)
    return calls


def assert_holds(buffer, model):
    assert len(buffer) == len(model.rows)
    expected, found = model.episodes(), list(buffer.episodes())
    assert [len(e) for e in expected] == [len(e["rewards"]) for e in found] == buffer.episode_lengths.tolist()
    for rows, episode in zip(expected, found, strict=True):
        assert episode["obs"][:, 0].tolist() == [r["value"] for r in rows]
        assert episode["row_ids"].tolist() == [r["value"] for r in rows]
        for key in ("first", "last", "terminal"):
            assert episode[f"is_{key}"].tolist() == [r[key] for r in rows]


@given(history=histories(), capacity=st.integers(1, 40), rows=st.integers(1, 6), block=st.sampled_from([1, 60, 10_000]))
@settings(max_examples=200, deadline=None)
def test_any_history_leaves_the_same_rows_as_the_list_model(history, capacity, rows, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worldloom.replay.table.BLOCK_BYTES", block)
        buffer, model = ReplayBuffer(capacity), ListModel(capacity)
        for call in history:
            add(buffer, *call)
            model.add(*call)
            assert_holds(buffer, model)
    streams = {s: [r["value"] for r in model.rows if r["stream"] == s] for s in {r["stream"] for r in model.rows}}
    windows = {tuple(v[n : n + rows]) for v in streams.values() for n in range(len(v) - rows + 1)}
    inside = {tuple(r["value"] for r in e[n : n + rows]) for e in model.episodes() for n in range(len(e) - rows + 1)}
    for allowed, crossing in ((inside, False), (windows, True)):
        if allowed:
            drawn = buffer.draw(64, rows, cross_episodes=crossing)
            assert {tuple(ids) for ids in drawn.tolist()} <= allowed


def index_state(index):
    """Everything that an index holds, stream by stream."""
    return {
        number: (stream.rows.values.tolist(), stream.starts.values.tolist(), stream.dropped, stream.in_progress)
        for number, stream in index._streams.items()
    }


@given(history=histories(), capacity=st.integers(1, 40), data=st.data())
@settings(max_examples=200, deadline=None)
def test_an_index_does_not_depend_on_how_rows_are_divided_into_calls(history, capacity, data):
    rows = [r for call in history for r in call]
    streams = np.array([r["stream"] for r in rows])
    flags = np.array([FIRST * r["first"] | LAST * r["last"] | TERMINAL * r["terminal"] for r in rows], np.uint8)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows) - 1))) if len(rows) > 1 else [])
    found = []
    for stops in ([*cuts, len(rows)], range(1, len(rows) + 1)):
        index, interrupted, begin = EpisodeIndex(), set(), 0
        for stop in stops:
            ids = np.arange(begin, stop)
            interrupted |= set(index.add(ids, streams[ids], flags[ids]).tolist())
            index.drop_before(stop - capacity)
            begin = stop
        found.append((index_state(index), {row for row in interrupted if row >= len(rows) - capacity}))
    assert found[0] == found[1]


@pytest.mark.parametrize("capacity", [7, 30, 1000])
def test_steps_added_at_once_leave_what_steps_added_one_by_one_leave(capacity):
    rng, steps, envs = np.random.default_rng(0), 40, 3
    ages, columns = np.zeros(envs, int), []
    for _ in range(steps):
        first, last = ages == 0, (ages > 0) & (rng.random(envs) < 0.3)
        actions = np.where(last[:, None], 0, rng.uniform(-1, 1, (envs, 2)))
        obs, rewards = rng.normal(size=(envs, 2)), np.where(first, 0, rng.normal(size=envs))
        columns.append((obs, actions, rewards, first, last, last & (rng.random(envs) < 0.5)))
        ages = np.where(last, 0, ages + 1)
    one_by_one, at_once = ReplayBuffer(capacity), ReplayBuffer(capacity)
    for step in columns:
        one_by_one.add_rows(*step)
    for part in (columns[:1], columns[1:12], columns[12:]):
        whole = [
            np.concatenate(column).astype(np.float32 if i < 3 else bool)
            for i, column in enumerate(zip(*part, strict=True))
        ]
        add_steps(at_once, *whole, envs, latents={})
    assert_same(one_by_one, at_once)
    assert index_state(one_by_one._storage.index) == index_state(at_once._storage.index)


@given(history=histories(), back=st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_restoring_a_checkpoint_undoes_everything_after_it(history, back):
    buffer, then = ReplayBuffer(10_000), ReplayBuffer(10_000)
    keep = max(1, len(history) - back)
    for call in history[:keep]:
        add(buffer, *call)
        add(then, *call)
    state = buffer.state_dict()
    for call in history[keep:]:
        add(buffer, *call)
    buffer.load_state_dict(state)
    assert_same(buffer, then)
    for stream in range(4):
        # Whether an episode is in progress is restored too: it decides which row may follow.
        answers = []
        for other in (buffer, then):
            try:
                answers.append(add(other, row(1_000, stream=stream)).tolist())
            except DataError as error:
                answers.append(str(error))
        assert answers[0] == answers[1]
    assert_same(buffer, then)


def assert_same(left, right):
    assert left.state_dict() == right.state_dict()
    for one, other in zip(left.episodes(), right.episodes(), strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_restoring_an_empty_buffer_and_evicted_rows():
    buffer = ReplayBuffer(3)
    empty = buffer.state_dict()
    add(buffer, row(0, first=True))
    buffer.load_state_dict(empty)
    assert (len(buffer), buffer.obs_shape) == (0, None)
    for n in range(5):
        add(buffer, row(n, first=n == 0))
    for state in ({"first_row": 0, "next_row": 3}, {"first_row": 2, "next_row": 9}):
        with pytest.raises(DataError, match="2 … 4 are held"):
            buffer.load_state_dict(state)
    assert len(buffer) == 3


def test_an_episode_can_be_sampled_while_in_progress():
    buffer = ReplayBuffer()
    for n in range(4):
        add(buffer, row(n, first=n == 0), row(10 + n, first=n == 0, stream=1))
    batch = buffer.sample(50, 4)
    assert set(batch["obs"][:, 0, 0]) == {0, 10}
    assert not batch["is_last"].any()
    assert (np.diff(batch["row_ids"], axis=1) == 2).all()


def test_a_crashed_environment_ends_its_episode_without_terminating_it():
    buffer = ReplayBuffer()
    for n, first in enumerate([True, False, False, True, False]):
        add(buffer, row(n, first=first))
    batch = buffer.sample(1, 5, cross_episodes=True)
    assert batch["is_last"].tolist() == [[False, False, True, False, False]]
    assert not batch["is_terminal"].any()
    assert buffer.episode_lengths.tolist() == [3, 2]


def test_offline_episodes_and_environments_do_not_mix():
    buffer = ReplayBuffer()
    buffer.add_episode(np.zeros((3, 1)), np.zeros((2, 1)), np.zeros(2))
    add(buffer, row(3, first=True))
    buffer.add_episode(np.zeros((3, 1)), np.zeros((2, 1)), np.zeros(2))
    add(buffer, row(7))
    assert [e["row_ids"].tolist() for e in buffer.episodes()] == [[0, 1, 2], [4, 5, 6], [3, 7]]
    ids = {tuple(w) for w in buffer.draw(200, 2, cross_episodes=True).tolist()}
    assert ids == {(0, 1), (1, 2), (2, 4), (4, 5), (5, 6), (3, 7)}


def test_discrete_actions_tasks_and_latents_by_row():
    buffer = ReplayBuffer(action_dim=3, latents={"deter": (2,)})
    flags = {"is_first": [True, True], "is_last": [False, False], "is_terminal": [False, False]}
    buffer.add_rows(np.zeros((2, 1)), [2, 0], [0, 0], **flags, task=[4, 5], latents={"deter": np.ones((2, 2))})
    flags = {"is_first": [False, False], "is_last": [True, True], "is_terminal": [True, False]}
    buffer.add_rows(np.zeros((2, 1)), [-1, 1], [1, 2], **flags, task=[4, 5])
    first, second = buffer.episodes()
    assert first["actions"].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert second["actions"].tolist() == [[1, 0, 0], [0, 1, 0]]
    assert (first["task"], second["task"]) == (4, 5)
    assert buffer.take([[0], [2]], latents=True)["context"]["deter"].tolist() == [[1, 1], [0, 0]]


GOOD = {
    "obs": np.zeros((2, 1)),
    "actions": np.zeros((2, 1)),
    "rewards": np.zeros(2),
    "is_first": [False, False],
    "is_last": [False, False],
    "is_terminal": [False, False],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"obs": np.zeros((3, 1))}, "Lengths"),
        ({"obs": np.full((2, 1), np.nan)}, "NaN"),
        ({"actions": np.full((2, 1), 2.0)}, "Scale"),
        ({"rewards": np.zeros((2, 1))}, "rewards"),
        ({"is_last": [True]}, "Lengths"),
        ({"is_last": [2, 0]}, "booleans"),
        ({"is_terminal": [True, False]}, "Stream 0 has a row that is terminal but not last"),
        ({"is_first": [True, True], "is_last": [False, True]}, "Stream 1 has an episode of one row"),
        ({"is_first": [False, True], "rewards": [0, 1]}, "Stream 1 got a reward"),
        ({"streams": [0, 0]}, "repeats"),
        ({"streams": [0, -1]}, "streams must lie"),
        ({"streams": [0.0, 1.0]}, "integers"),
        ({"streams": [0, 7]}, "Stream 7 has no episode in progress"),
        ({"streams": [0, 2]}, "Stream 2 has no episode in progress"),
        ({"task": 1}, "task"),
        ({"latents": {"deter": np.zeros((2, 2))}}, "deter"),
    ],
)
def test_bad_rows_are_refused_and_leave_the_buffer_as_it_was(changes, message):
    buffer = ReplayBuffer()
    start = {**GOOD, "is_first": [True, True]}
    buffer.add_rows(**start)
    buffer.add_rows(**start, streams=[2, 3])
    buffer.add_rows(**GOOD)
    buffer.add_rows(**{**GOOD, "is_last": [True, False]}, streams=[2, 3])
    before = buffer.state_dict(), [{k: v.tobytes() for k, v in e.items()} for e in buffer.episodes()]
    with pytest.raises(DataError, match=message):
        buffer.add_rows(**{**GOOD, **changes})
    assert before == (buffer.state_dict(), [{k: v.tobytes() for k, v in e.items()} for e in buffer.episodes()])
    buffer.add_rows(**GOOD)


def test_a_stream_whose_rows_were_all_evicted_continues_its_episode():
    buffer = ReplayBuffer(2)
    add(buffer, row(0, first=True, stream=5))
    for n in range(1, 4):
        add(buffer, row(n, first=n == 1))
    add(buffer, row(4, stream=5))
    assert buffer.episode_lengths.tolist() == [1, 1]
    assert [e["obs"].ravel().tolist() for e in buffer.episodes()] == [[3], [4]]
