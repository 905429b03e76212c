"""Scores of runs: windows, aggregates, and Crafter's score."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom.algorithm import Curve, ScoreRule
from worldloom.errors import ConfigError, DataError, FileFormatError
from worldloom.report.curves import learning_curve
from worldloom.report.score import (
    bootstrap_interval,
    geometric_score,
    interquartile_mean,
    published_at,
    read_episodes,
    score,
)

EPISODES = [{"episode": i, "env_steps": 100 * (i + 1), "return": float(i), "length": 100} for i in range(40)]
RECORDS = [{"env_steps": 500 * i, "step": i, "eval/return": 10.0 * i} for i in range(9)]


def rule(source, window=None):
    return ScoreRule(source, window, "")


def test_a_window_holds_the_episodes_that_end_in_it():
    found = score(rule("training", (1_000, 1_500)), EPISODES, [], budget=4_000)
    # Episodes that end after 1,100 … 1,500 steps.
    assert (found.value, found.env_steps, found.episodes) == (np.mean([10, 11, 12, 13, 14]), 1_500, 5)
    assert "1,000–1,500" in found.text


def test_a_rule_without_a_window_takes_the_last_twentieth_of_the_budget():
    assert score(rule("training"), EPISODES, [], budget=4_000).value == np.mean([38, 39])
    # A run that has not got there is scored where it is.
    assert score(rule("training"), EPISODES[:20], [], budget=4_000).value == np.mean([18, 19])
    assert score(rule("training"), EPISODES, [], budget=4_000, at=1_000, window=300).value == np.mean([7, 8, 9])


@pytest.mark.parametrize("why", ["crashed", "bad_step"])
def test_episodes_that_were_cut_do_not_count(why, tmp_path):
    cut = [*EPISODES, {"env_steps": 3_950, "return": 1e9, why: True}]
    (tmp_path / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in cut))
    whole = read_episodes(tmp_path / "episodes.jsonl")
    assert score(rule("training"), whole, [], budget=4_000).value == np.mean([38, 39])


def test_an_evaluation_counts_up_to_the_end_of_the_budget():
    assert score(rule("evaluation"), EPISODES, RECORDS, budget=4_000).value == 80.0
    assert score(rule("evaluation"), EPISODES, RECORDS, budget=4_000, at=1_200).value == 20.0
    assert score(rule("evaluation"), EPISODES, RECORDS, budget=1_999).env_steps == 1_500
    with pytest.raises(DataError, match="greedy_return"):
        score(rule("greedy"), EPISODES, RECORDS, budget=4_000)
    with pytest.raises(DataError, match="No training episode ended between 5,000 and 6,000"):
        score(rule("training"), EPISODES, RECORDS, budget=4_000, at=6_000, window=1_000)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "text"])
def test_an_evaluation_without_a_finite_return_is_no_score_and_no_older_one_takes_its_place(value):
    records = [*RECORDS, {"env_steps": 4_100, "step": 9, "eval/return": value}]
    with pytest.raises(DataError, match=r"after 4,100 environment steps is no finite number; --at 4000 scores"):
        score(rule("evaluation"), EPISODES, records, budget=5_000)
    assert score(rule("evaluation"), EPISODES, records, budget=5_000, at=4_000).value == 80.0
    with pytest.raises(DataError, match=r"is no finite number\.$"):
        score(rule("evaluation"), EPISODES, records[-1:], budget=5_000)


@pytest.mark.parametrize("source", ["evaluation", "greedy", "achievements"])
def test_a_window_is_refused_where_there_is_none(source):
    with pytest.raises(ConfigError, match=f"statistic here is '{source}'"):
        score(rule(source), EPISODES, RECORDS, budget=4_000, window=100)


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_holds_at_least_a_step(window):
    with pytest.raises(ConfigError, match="window must be at least 1 environment step"):
        score(rule("training"), EPISODES, RECORDS, budget=4_000, window=window)


def test_whole_episodes_are_read_and_a_line_that_is_none_is_named(tmp_path):
    path = tmp_path / "episodes.jsonl"
    assert read_episodes(path) == []
    cut = [{"env_steps": 5, "return": None, "crashed": True}, {"env_steps": 6, "bad_step": True}]
    path.write_text("\n".join(map(json.dumps, [*EPISODES, *cut])) + '\n{"env_steps": 7, "ret')
    assert read_episodes(path) == EPISODES
    for line, message in (
        ({"return": 3.0}, "line 2: env_steps of an episode must be a finite number, not None"),
        ({"env_steps": 3}, "line 2: return of an episode must be a finite number, not None"),
        ({"env_steps": 3, "return": float("nan")}, "line 2: return of an episode must be a finite number, not nan"),
        ({"env_steps": "3", "return": 1.0}, "line 2: env_steps of an episode must be a finite number, not '3'"),
        ({"env_steps": 3, "return": 1.0, "info": [1]}, "line 2: info of an episode must be an object"),
    ):
        path.write_text(f"{json.dumps(EPISODES[0])}\n{json.dumps(line)}\n")
        with pytest.raises(FileFormatError, match=message):
            read_episodes(path)


def test_the_crafter_score_is_the_geometric_mean_of_success_rates():
    assert geometric_score([0.0, 0.0]) == 0.0
    assert geometric_score([7.0, 7.0, 7.0]) == pytest.approx(7.0)
    assert geometric_score([100.0, 0.0]) == pytest.approx(np.sqrt(101) - 1)
    episodes = [
        {"env_steps": 10 * i, "return": 0.0, "info": {"achievements/wood": i % 2, "achievements/gold": 0, "other": 5}}
        for i in range(1, 5)
    ]
    found = score(rule("achievements"), episodes, [], budget=40)
    assert found.rates == {"gold": 0.0, "wood": 50.0}
    assert found.value == pytest.approx(np.sqrt(51) - 1)
    with pytest.raises(DataError, match="reports achievements"):
        score(rule("achievements"), EPISODES, [], budget=4_000)


def test_the_interquartile_mean_leaves_out_a_quarter_on_either_side():
    assert interquartile_mean([1, 2, 3, 4]) == 2.5
    assert interquartile_mean([-1e9, 2, 4, 1e9]) == 3.0
    assert interquartile_mean([5, 1, 3]) == 3.0  # too few to leave any out
    assert interquartile_mean([[0, 10, 20, 30], [40, 50, 60, 70]]) == 35.0


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=6), min_size=1, max_size=4),
    st.floats(-50, 50),
    st.floats(0.1, 10),
)
def test_the_interval_moves_with_its_scores(tasks, offset, factor):
    low, high = bootstrap_interval(tasks, repetitions=200)
    everything = [value for runs in tasks for value in runs]
    assert min(everything) - 1e-9 <= low <= high <= max(everything) + 1e-9
    moved = bootstrap_interval([[factor * v + offset for v in runs] for runs in tasks], repetitions=200)
    np.testing.assert_allclose(moved, [factor * low + offset, factor * high + offset], rtol=1e-6, atol=1e-6)


def test_runs_are_drawn_within_their_task():
    # One run per task leaves nothing to draw.
    assert bootstrap_interval([[1.0], [5.0], [9.0]]) == (5.0, 5.0)
    # Drawn over all runs, the mean of two tasks would vary between 0 and 100; within tasks it cannot.
    low, high = bootstrap_interval([[0.0, 1.0, 2.0], [100.0, 101.0, 102.0]])
    assert 48 < low < high < 54


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        low, high = bootstrap_interval(rng.normal(3.0, 1.0, (2, 20)), repetitions=300, seed=trial)
        covered += low <= 3.0 <= high
    assert covered >= 85


def test_a_published_curve_is_drawn_behind_the_returns(tmp_path):
    pytest.importorskip("matplotlib")
    curve = Curve([0, 4_000], [0.0, 60.0], [0.0, 40.0], [0.0, 90.0])
    plain = learning_curve(RECORDS, tmp_path / "plain.png").read_bytes()
    banded = learning_curve(RECORDS, tmp_path / "banded.png", published=curve).read_bytes()
    assert plain != banded
    assert banded[:4] == b"\x89PNG"


def test_a_published_curve_is_read_between_its_points():
    curve = Curve([0, 100], [0.0, 10.0], [0.0, 5.0], [0.0, 20.0])
    assert published_at(curve, 50) == (5.0, 2.5, 10.0)
    assert published_at(curve, 101) is None
    assert published_at(curve, -1) is None
