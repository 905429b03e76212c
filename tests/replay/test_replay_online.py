"""Fresh rows are handed out once and in order; windows of finished episodes leave out those in progress."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom.errors import DataError
from worldloom.replay import ReplayBuffer, ReplayStore
from worldloom.replay.online import OnlineQueue


def step(buffer, number, lasts, firsts):
    """Add one row to each stream; the observation is (stream, position in the stream)."""
    n = len(lasts)
    obs = np.stack([np.arange(n), np.full(n, number)], -1).astype(np.float32)
    buffer.add_rows(obs, np.zeros((n, 1), np.float32), np.zeros(n), firsts, lasts, np.zeros(n, bool))


def filled(lengths, capacity=10_000):
    """One stream with finished episodes of these rows; the last one is in progress."""
    buffer, number = ReplayBuffer(capacity), 0
    for episode, length in enumerate(lengths):
        for row in range(length):
            over = row == length - 1 and episode < len(lengths) - 1
            step(buffer, number, np.array([over]), np.array([row == 0]))
            number += 1
    return buffer


@settings(deadline=None, max_examples=40)
@given(
    streams=st.integers(1, 3),
    rows=st.integers(2, 7),
    steps=st.integers(1, 60),
    every=st.integers(1, 9),
    capacity=st.sampled_from([40, 10_000]),
)
def test_every_window_is_handed_out_once_as_soon_as_it_is_complete(streams, rows, steps, every, capacity):
    buffer, queue, seen = ReplayBuffer(capacity), OnlineQueue(), []
    for number in range(steps):
        step(buffer, number, np.zeros(streams, bool), np.full(streams, number == 0))
        if number % every == 0:
            windows = queue.pop(buffer, 100, rows)
            assert windows.shape[1:] == (rows,)
            for ids in windows:
                obs = buffer.take(ids)["obs"]
                stream, start = int(obs[0, 0]), int(obs[0, 1])
                assert start % rows == 0
                np.testing.assert_array_equal(obs[:, 0], stream)
                np.testing.assert_array_equal(obs[:, 1], start + np.arange(rows))
                seen.append((start + rows, stream))
    assert seen == sorted(seen), "not in the order in which they became complete"
    assert len(set(seen)) == len(seen)
    if capacity == 10_000:
        complete = (every * ((steps - 1) // every) + 1) // rows
        assert seen == [(rows * (k + 1), s) for k in range(complete) for s in range(streams)]


@settings(deadline=None, max_examples=25)
@given(streams=st.integers(1, 3), rows=st.integers(2, 7), steps=st.integers(20, 60), cut=st.integers(1, 59))
def test_windows_are_cut_at_the_same_rows_after_loading(tmp_path_factory, streams, rows, steps, cut):
    """Also where rows were dropped: windows count from a stream's first row, whether it is held or not."""
    cut, store = min(cut, steps - 1), ReplayStore(tmp_path_factory.mktemp("store"))
    whole, queue = ReplayBuffer(30), OnlineQueue()
    for number in range(cut):
        step(whole, number, np.zeros(streams, bool), np.full(streams, number == 0))
    queue.pop(whole, 100, rows)
    loaded, resumed = store.load(json.loads(json.dumps(store.write(whole)))), OnlineQueue(queue.drawn)
    for number in range(cut, steps):
        for buffer in (whole, loaded):
            step(buffer, number, np.zeros(streams, bool), np.zeros(streams, bool))
        np.testing.assert_array_equal(resumed.pop(loaded, 100, rows), queue.pop(whole, 100, rows))


def test_a_queue_that_is_longer_than_a_batch_goes_on_in_the_next_one():
    buffer = filled([30])
    queue = OnlineQueue()
    assert queue.pop(buffer, 2, 5)[:, 0].tolist() == [0, 5]
    # All that a checkpoint holds of it is one number.
    queue = OnlineQueue(queue.drawn)
    assert queue.pop(buffer, 10, 5)[:, 0].tolist() == [10, 15, 20, 25]
    assert len(queue.pop(buffer, 10, 5)) == 0


def test_rows_that_were_there_before_are_not_fresh():
    buffer = filled([20])
    assert len(OnlineQueue(19).pop(buffer, 10, 5)) == 0
    recorded = ReplayBuffer(1_000)
    recorded.add_episode(np.zeros((20, 2)), np.zeros((19, 1)), np.zeros(19), truncated=True)
    assert len(OnlineQueue().pop(recorded, 10, 5)) == 0


@pytest.mark.parametrize("cross_episodes", [False, True])
def test_windows_of_finished_episodes_leave_out_the_one_in_progress(cross_episodes):
    buffer = filled([6, 8, 5, 4])
    options = {"seed": 1, "cross_episodes": cross_episodes}
    drawn = np.concatenate([buffer.draw(256, 4, update=n, **options, finished=True) for n in range(20)])
    assert drawn.max() == 6 + 8 + 5 - 1
    everything = np.concatenate([buffer.draw(256, 4, update=n, **options) for n in range(20)])
    assert everything.max() == 6 + 8 + 5 + 4 - 1
    # Same uniform numbers: what is drawn of finished episodes alone has the statistics of a buffer without the other.
    whole = filled([6, 8, 5, 0])
    again = np.concatenate([whole.draw(256, 4, update=n, **options) for n in range(20)])
    np.testing.assert_array_equal(drawn, again)


def test_each_finished_episode_is_equally_likely_and_each_start_in_it():
    buffer = filled([6, 8, 5, 4])
    drawn = np.concatenate([buffer.draw(256, 4, update=n, finished=True)[:, 0] for n in range(60)])
    counts = np.bincount(drawn, minlength=19)
    starts = {0: range(3), 6: range(5), 14: range(2)}
    expected = np.zeros(19)
    for first, offsets in starts.items():
        for offset in offsets:
            expected[first + offset] = len(drawn) / 3 / len(offsets)
    assert not counts[expected == 0].any()
    # Five standard deviations of a binomial count.
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("cross_episodes", [False, True])
def test_an_episode_in_progress_is_used_while_no_finished_one_is_long_enough(cross_episodes):
    buffer = filled([2, 9])
    ids = buffer.draw(64, 5, cross_episodes=cross_episodes, finished=True)
    assert ids.max() == 10
    with pytest.raises(DataError, match="A window needs 12 rows"):
        buffer.draw(4, 12, cross_episodes=cross_episodes, finished=True)
