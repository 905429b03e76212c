"""Sampling windows: what a window may hold, its probability, and that a batch depends only on its arguments."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from trees import assert_same

from worldloom.errors import ConfigError, DataError
from worldloom.replay import ReplayBuffer
from worldloom.replay.sampling import uniform


def numbered(lengths, capacity=100_000, **described):
    """Episodes with ``lengths`` rows; an observation is (episode, step in it)."""
    buffer = ReplayBuffer(capacity, **described)
    for episode, rows in enumerate(lengths):
        obs = np.stack([np.full(rows, episode), np.arange(rows)], axis=1)
        reward = np.arange(1, rows)
        buffer.add_episode(obs, np.full((rows - 1, 1), 0.5), reward, terminated=episode % 2 == 0)
    return buffer


@pytest.mark.parametrize(
    ("lengths", "rows"), list(itertools.product([(5,), (2, 9, 3, 7), (4,) * 6, (30, 2, 2)], (1, 2, 4)))
)
def test_plain_windows_are_successive_rows_of_one_episode(lengths, rows):
    batch = numbered(lengths).sample(64, rows)
    episode, step = batch["obs"][..., 0].astype(int), batch["obs"][..., 1].astype(int)
    assert (episode == episode[:, :1]).all()
    assert (np.diff(step, axis=1) == 1).all()
    assert (np.diff(batch["row_ids"], axis=1) == 1).all()
    length = np.array(lengths)[episode]
    np.testing.assert_array_equal(batch["is_first"], step == 0)
    np.testing.assert_array_equal(batch["is_last"], step == length - 1)
    np.testing.assert_array_equal(batch["is_terminal"], (step == length - 1) & (episode % 2 == 0))
    np.testing.assert_array_equal(batch["rewards"], step)
    np.testing.assert_array_equal(batch["actions"][..., 0], np.where(step == length - 1, 0, 0.5))


@given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=8),
    rows=st.integers(1, 14),
    capacity=st.integers(1, 60),
    crossing=st.booleans(),
    update=st.integers(0, 2**40),
)
@settings(max_examples=150, deadline=None)
def test_windows_follow_time_in_any_buffer(lengths, rows, capacity, crossing, update):
    buffer = numbered(lengths, capacity)
    oldest = max(0, sum(lengths) - capacity)
    assert buffer.state_dict() == {"first_row": oldest, "next_row": sum(lengths)}
    held = len(buffer) if crossing else int(buffer.episode_lengths.max())
    if held < rows:
        with pytest.raises(DataError, match=f"needs {rows} rows; the longest .* has {held}"):
            buffer.sample(1, rows, cross_episodes=crossing)
        return
    batch = buffer.sample(8, rows, update=update, cross_episodes=crossing)
    ids = batch["row_ids"]
    assert ids.min() >= oldest
    assert (np.diff(ids, axis=1) == 1).all()
    expected = np.concatenate([[(e, s) for s in range(n)] for e, n in enumerate(lengths)])
    np.testing.assert_array_equal(batch["obs"], expected[ids])
    np.testing.assert_array_equal(batch["is_first"], expected[ids][..., 1] == 0)
    seams = batch["is_first"][:, 1:]
    assert (batch["is_last"][:, :-1] == seams).all()
    assert crossing or not seams.any()


def frequencies(buffer, rows, draws, **kwargs):
    ids = np.concatenate([buffer.draw(500, rows, seed=7, update=u, **kwargs)[:, 0] for u in range(draws // 500)])
    return np.bincount(ids, minlength=len(buffer))


def test_plain_sampling_is_uniform_over_episodes_then_over_starts():
    lengths, rows = np.array([4, 9, 2, 6]), 4  # the third is too short
    counts = frequencies(numbered(lengths), rows, 20_000)
    expected = np.zeros(lengths.sum())
    for begin, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
        starts = length - rows + 1
        if starts > 0:
            expected[begin : begin + starts] = 1 / 3 / starts
    assert not counts[expected == 0].any()
    possible = expected > 0
    assert stats.chisquare(counts[possible], 20_000 * expected[possible]).pvalue > 0.01


def test_crossing_sampling_is_uniform_over_all_windows():
    buffer, rows = numbered([4, 9, 2, 6]), 5
    counts = frequencies(buffer, rows, 20_000, cross_episodes=True)
    assert not counts[17:].any()
    assert stats.chisquare(counts[:17]).pvalue > 0.01


def test_crossing_sampling_weighs_streams_by_their_windows():
    buffer = ReplayBuffer()
    for step in range(20):
        streams = [0, 1] if step < 8 else [1]
        n = len(streams)
        flags = np.full(n, step == 0), np.zeros(n), np.zeros(n)
        buffer.add_rows(np.array([[s] for s in streams]), np.zeros((n, 1)), np.zeros(n), *flags, streams=streams)
    first = np.concatenate(
        [buffer.sample(500, 5, seed=3, update=u, cross_episodes=True)["obs"][:, 0, 0] for u in range(40)]
    )
    assert stats.binomtest(int((first == 0).sum()), 20_000, 4 / 20).pvalue > 0.01


def test_successive_updates_and_seeds_draw_independently():
    draws = uniform(0, 0, (4000,)), uniform(0, 1, (4000,)), uniform(1, 0, (4000,))
    for left, right in itertools.combinations(draws, 2):
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.05
    assert stats.kstest(draws[0], "uniform").pvalue > 0.01


def test_draws_are_the_same_on_every_machine_and_numpy():
    # Recorded: a run resumed on another machine must continue with the same batches.
    np.testing.assert_array_equal(numbered([10, 20, 30]).draw(6, 3, seed=42, update=7)[:, 0], RECORDED)
    np.testing.assert_array_equal(
        numbered([10, 20, 30]).draw(6, 3, seed=42, update=7, cross_episodes=True)[:, 0], RECORDED_CROSSING
    )


RECORDED = [5, 5, 0, 12, 21, 6]
RECORDED_CROSSING = [0, 4, 3, 28, 20, 17]


@pytest.mark.parametrize("crossing", [False, True])
def test_sample_is_a_pure_function_of_seed_update_and_content(crossing):
    left, right = numbered([5, 8, 13]), numbered([5, 8, 13])
    first = left.sample(16, 4, seed=1, update=3, cross_episodes=crossing)
    left.sample(3, 2, seed=9)
    np.random.default_rng(0).random(10)
    assert_same(left.sample(16, 4, seed=1, update=3, cross_episodes=crossing), first)
    assert_same(right.sample(16, 4, seed=1, update=3, cross_episodes=crossing), first)
    for other in ({"seed": 2, "update": 3}, {"seed": 1, "update": 4}):
        assert not np.array_equal(left.draw(16, 4, **other, cross_episodes=crossing), first["row_ids"])


def test_the_same_content_gives_the_same_batches_however_it_was_added():
    grown = numbered([6] * 9, capacity=24)
    kept = grown.episodes()
    again = ReplayBuffer(1000)
    for episode in kept:
        again.add_episode(episode["obs"], episode["actions"], episode["rewards"], episode["is_terminal"])
    left, right = (b.sample(16, 4, update=5) for b in (grown, again))
    np.testing.assert_array_equal(left["obs"], right["obs"])
    np.testing.assert_array_equal(left["row_ids"] - 30, right["row_ids"])


def test_short_episodes_are_kept_reported_and_never_sampled():
    buffer = numbered([3, 12, 4])
    assert buffer.num_episodes == 3
    assert set(buffer.sample(200, 5)["obs"][..., 0].ravel()) == {1}
    assert buffer.summary(5)["episodes_too_short"] == 2
    with pytest.raises(DataError, match=r"A window needs 13 rows; the longest episode held has 12\. .*cross_episodes"):
        buffer.sample(1, 13)
    assert buffer.sample(1, 13, cross_episodes=True)["obs"].shape == (1, 13, 2)
    with pytest.raises(DataError, match="longest stream held has 19"):
        buffer.sample(1, 20, cross_episodes=True)


def test_an_empty_buffer_raises():
    for call in (lambda b: b.sample(1, 1), lambda b: b.sample(1, 1, cross_episodes=True), lambda b: b.take([0])):
        with pytest.raises(DataError, match="empty"):
            call(ReplayBuffer())


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"sequence_length": 0}, {"seed": -1}, {"update": 1.5}])
def test_arguments_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        numbered([5]).sample(**{"batch_size": 1, "sequence_length": 1, **wrong})


def test_capacity_is_exact_and_the_oldest_rows_leave_first():
    buffer = numbered([5, 6, 7], capacity=10)
    assert len(buffer) == 10
    assert buffer.episode_lengths.tolist() == [3, 7]
    first, second = buffer.episodes()
    assert first["obs"][:, 1].tolist() == [3, 4, 5]
    assert not first["is_first"].any()
    assert second["is_first"].tolist() == [True] + [False] * 6
    for gone in ([7], [18], [], 9):
        with pytest.raises(DataError, match=r"row_ids"):
            buffer.take(np.array(gone, int))


def test_an_episode_longer_than_the_buffer_keeps_its_end():
    buffer = numbered([50], capacity=8)
    (episode,) = buffer.episodes()
    assert episode["obs"][:, 1].tolist() == list(range(42, 50))


def test_the_block_size_does_not_change_batches(monkeypatch):
    whole = numbered([7, 30, 11, 25], capacity=50)
    monkeypatch.setattr("worldloom.replay.table.BLOCK_BYTES", 100)  # four rows
    pieces = numbered([7, 30, 11, 25], capacity=50)
    assert pieces.content().rows.block_rows == 4
    assert len(pieces.content().rows._blocks) <= 50 / 4 + 2
    for crossing in (False, True):
        assert_same(*(b.sample(32, 9, cross_episodes=crossing) for b in (whole, pieces)))


def test_rows_dropped_at_either_end_free_their_blocks(monkeypatch):
    monkeypatch.setattr("worldloom.replay.table.BLOCK_BYTES", 1)
    buffer = numbered([20])
    buffer.load_state_dict({"first_row": 5, "next_row": 12})
    assert sorted(buffer.content().rows._blocks) == list(range(5, 12))
    assert buffer.episode_lengths.tolist() == [7]


def test_memory_is_allocated_for_rows_not_for_capacity():
    buffer = ReplayBuffer(10**12)
    buffer.add_episode(np.zeros((3, 64, 64, 3), np.uint8), np.zeros((2, 1)), np.zeros(2))
    assert sum(a.nbytes for block in buffer.content().rows._blocks.values() for a in block.values()) <= 2**25


# ---- latents ------------------------------------------------------------------------------------------------------


def latent_buffer(capacity=1000):
    return numbered([6, 6], capacity, latents={"deter": (3,), "stoch": (2, 4)})


def test_latents_are_zero_until_written_and_belong_to_row_0():
    buffer = latent_buffer()
    context = buffer.sample(5, 3, latents=True)["context"]
    assert {k: (v.shape, v.dtype, v.any()) for k, v in context.items()} == {
        "deter": ((5, 3), np.float32, False),
        "stoch": ((5, 2, 4), np.float32, False),
    }
    ids = np.arange(12)
    buffer.write_latents(ids, {"deter": np.repeat(ids[:, None], 3, axis=1)})
    batch = buffer.sample(5, 3, latents=True)
    np.testing.assert_array_equal(batch["context"]["deter"][:, 0], batch["row_ids"][:, 0])
    assert not batch["context"]["stoch"].any()
    assert "context" not in buffer.sample(5, 3)


def test_writing_latents_of_overlapping_windows_and_evicted_rows(monkeypatch):
    monkeypatch.setattr("worldloom.replay.table.BLOCK_BYTES", 1)  # evicted rows leave memory at once
    buffer = latent_buffer(capacity=8)  # rows 4 … 11 are left
    ids = np.array([[2, 3, 4, 5], [4, 5, 6, 7]])
    buffer.write_latents(ids, {"deter": np.arange(8.0).reshape(2, 4, 1) * np.ones(3)})
    context = buffer.take(np.arange(4, 12)[:, None], latents=True)["context"]
    assert context["deter"][:, 0].tolist() == [4, 5, 6, 7, 0, 0, 0, 0]
    buffer.write_latents(np.array([0, 1]), {"deter": np.ones((2, 3))})


@pytest.mark.parametrize(
    ("ids", "latents", "message"),
    [
        ([0, 1], {"other": np.zeros((2, 3))}, "no latents 'other'"),
        ([0, 1], {"deter": np.zeros((2, 4))}, r"\(2, 3\) is needed"),
        ([0, 1], {"deter": np.full((2, 3), np.nan)}, "NaN"),
        ([0, 12], {"deter": np.zeros((2, 3))}, "row_ids"),
        ([0, -1], {"deter": np.zeros((2, 3))}, "row_ids"),
        ([0.0, 1.0], {"deter": np.zeros((2, 3))}, "integers"),
        ([0, 1], {"deter": np.ones((2, 3)), "stoch": np.zeros((2, 2))}, "stoch"),
    ],
)
def test_bad_latents_write_nothing(ids, latents, message):
    buffer = latent_buffer()
    with pytest.raises(DataError, match=message):
        buffer.write_latents(np.array(ids), latents)
    assert not buffer.take(np.arange(12)[:, None], latents=True)["context"]["deter"].any()


def test_latents_can_be_added_to_existing_rows():
    buffer = numbered([6, 6])
    with pytest.raises(DataError, match="ensure_latents"):
        buffer.sample(2, 3, latents=True)
    buffer.ensure_latents({"deter": (3,)})
    buffer.ensure_latents({"deter": (3,)})
    assert not buffer.sample(2, 3, latents=True)["context"]["deter"].any()
    with pytest.raises(DataError, match="shape"):
        buffer.ensure_latents({"deter": (4,)})
    buffer.add_episode(np.zeros((3, 2)), np.zeros((2, 1)), np.zeros(2))
    assert len(buffer) == 15


@pytest.mark.slow
def test_the_work_per_batch_does_not_grow_with_the_buffer():
    import timeit

    small, large = (numbered([501] * n) for n in (20, 190))
    times = [min(timeit.repeat(lambda b=b: b.sample(16, 64), number=20, repeat=10)) for b in (small, large)]
    assert times[1] < 3 * times[0]
