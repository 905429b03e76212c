"""What inspect finds in a dataset, what convert writes, and the commands for both."""

import logging

import numpy as np
import pytest
from dataset_writers import flat, multitask_arrays, recorded, write_npz_folder, write_pt

import worldloom.data
from worldloom.cli import main
from worldloom.errors import ConfigError


def test_inspect_reads_returns_lengths_ends_and_ranges(tmp_path):
    episodes = recorded(count=8)
    dataset = worldloom.data.open(write_npz_folder(tmp_path / "episodes", episodes))
    found = worldloom.data.inspect(dataset)
    np.testing.assert_allclose(found.returns, [e.rewards.sum() for e in episodes], rtol=1e-5)
    np.testing.assert_array_equal(found.lengths, [len(e.rewards) for e in episodes])
    np.testing.assert_array_equal(found.terminal, [e.terminated for e in episodes])
    every = np.concatenate([e.obs for e in episodes])
    assert found.obs_range == {"obs": (float(every.min()), float(every.max()))}
    assert (found.problems, found.unreadable) == ([], 0)
    assert len(worldloom.data.inspect(dataset, max_episodes=3).returns) == 3


def test_inspect_names_the_row_of_every_problem(tmp_path):
    arrays = flat(recorded(count=4, lengths=[5]))
    arrays["observations"][7, 1] = np.nan
    arrays["actions"][13, 0] = 4
    np.savez(tmp_path / "x.npz", **arrays)
    found = worldloom.data.inspect(worldloom.data.open(tmp_path / "x.npz"))
    assert found.unreadable == 2
    assert "Row 2 of episode 1 of" in found.problems[0]
    assert "NaN" in found.problems[0]
    assert "Row 3 of episode 2 of" in found.problems[1]
    assert np.isnan(found.returns).tolist() == [False, True, True, False]


def test_inspect_notes_what_is_suspicious(tmp_path):
    arrays = flat([e._replace(terminated=False) for e in recorded()])
    arrays |= {"rewards": arrays["rewards"] * 0, "actions": arrays["actions"] / 10}
    np.savez(tmp_path / "x.npz", **arrays)
    notes = " ".join(worldloom.data.inspect(worldloom.data.open(tmp_path / "x.npz")).notes)
    for part in ("All rewards are 0", "scaled to [-1, 1]", "none is marked terminal"):
        assert part in notes


@pytest.mark.parametrize("kind", ["continuous", "discrete", "tasks", "by name"])
def test_a_converted_dataset_has_the_same_rows(tmp_path, kind):
    if kind == "tasks":
        path = write_pt(tmp_path / "x.pt", multitask_arrays(recorded(lengths=[6]), [0, 1, 2, 0, 1, 2]))
    elif kind == "by name":
        arrays = flat(recorded())
        for key in ("observations", "next_observations"):
            arrays |= {f"{key}/a": arrays[key][:, :2], f"{key}/b": arrays.pop(key)[:, 2:]}
        path = tmp_path / "x.npz"
        np.savez(path, **arrays)
    else:
        path = write_npz_folder(tmp_path / "x", recorded(discrete=kind == "discrete"))
    options = {"action_dim": 7} if kind == "discrete" else {}
    dataset = worldloom.data.open(path, **options)
    folder = worldloom.data.convert(dataset, tmp_path / "out", file_bytes=400)
    converted = worldloom.data.open(folder)
    assert len(list(folder.iterdir())) > 1
    assert converted.action_dim == dataset.action_dim
    for one, other in zip(dataset.episodes(), converted.episodes(), strict=True):
        for name in ("actions", "rewards", "is_first", "is_last", "is_terminal", *(["task"] if "task" in one else [])):
            np.testing.assert_array_equal(one[name], other[name])
        np.testing.assert_equal(one["obs"], other["obs"])


def test_convert_overwrites_nothing(tmp_path):
    dataset = worldloom.data.open(write_npz_folder(tmp_path / "x", recorded()))
    with pytest.raises(ConfigError, match="holds something already"):
        worldloom.data.convert(dataset, tmp_path / "x")


def test_the_commands_print_what_was_found(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    write_npz_folder(tmp_path / "mine", recorded(), compressed=True)
    logger = logging.getLogger("worldloom")
    before = logger.level, logger.propagate, list(logger.handlers)
    try:
        assert main(["data", "inspect", "mine", "--picture", "look.png"]) == 0
        out = capsys.readouterr().out
        for part in (
            "observations  (3,)",
            "2 continuous",
            "6, ",
            "3 terminal, 3 cut",
            "problems      none",
            "look.png",
        ):
            assert part in out
        assert (tmp_path / "look.png").read_bytes().startswith(b"\x89PNG")
        assert main(["data", "convert", "mine", "--to", "out"]) == 0
        assert "--data out" in capsys.readouterr().out
        assert main(["data", "inspect", "out", "--episodes", "2"]) == 0
        assert "(2 of them read)" in capsys.readouterr().out
        for words, message in (
            (["inspect", "missing"], "does not exist"),
            (["convert", "mine"], "needs --to"),
            (["convrt"], "Did you mean 'convert'"),
            (["inspect", "mine", "--data-option", "action_dims=3"], "Did you mean 'action_dim'"),
        ):
            assert main(["data", *words]) == 2
            assert message in capsys.readouterr().err
        (tmp_path / "bad").mkdir()
        arrays = flat(recorded())
        arrays["rewards"][0] = np.inf
        np.savez(tmp_path / "bad" / "x.npz", **arrays)
        assert main(["data", "inspect", "bad"]) == 1
        assert "problem       Row 1 of episode 0" in capsys.readouterr().out
    finally:
        logger.setLevel(before[0])
        logger.propagate, logger.handlers = before[1], before[2]
