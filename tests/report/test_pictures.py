"""Plots and videos of a run, read back from the axes or the files; and the errors when they cannot be drawn."""

import json
import sys

import numpy as np
import pytest

from worldloom import create_world_model
from worldloom.envs.names import entry_names
from worldloom.errors import ConfigError, DataError, MissingDependencyError
from worldloom.report.curves import learning_curve, points, read_records
from worldloom.report.figure import new_figure
from worldloom.report.imagination import _separate_windows, draw_horizon_errors, draw_open_loop, horizon_errors
from worldloom.report.openloop import OpenLoop
from worldloom.report.video import save_gif

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, as (figure, axes)."""
    import worldloom.report.curves
    import worldloom.report.imagination

    figures = []

    def record(*args, **kwargs):
        figures.append(new_figure(*args, **kwargs))
        return figures[-1]

    for module in (worldloom.report.curves, worldloom.report.imagination):
        monkeypatch.setattr(module, "new_figure", record)
    return figures


def is_picture(path):
    with Image.open(path) as picture:
        # A blank image has one colour.
        return picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 20)) > 3


def test_records_are_read_and_a_truncated_line_is_skipped(tmp_path):
    lines = [{"step": 1, "env_steps": 10, "a": 2.0}, {"step": 2, "env_steps": 20, "a": None}, {"step": 3, "b": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "a"')
    records = read_records(tmp_path / "metrics.jsonl")
    assert records == lines
    x, y = points(records, "a")
    np.testing.assert_array_equal(x, [10, 20])
    np.testing.assert_array_equal(y, [2.0, np.nan])
    np.testing.assert_array_equal(points(records, "b")[0], [3])


def test_returns_are_drawn_with_their_standard_deviation_against_environment_steps(tmp_path, drawn):
    records = [
        {"step": 0, "env_steps": 100, "collect/return": 1.0},
        {"step": 50, "env_steps": 200, "eval/return": 3.0, "eval/return_std": 0.5},
        {"step": 100, "env_steps": 250, "collect/return": 2.0},
        {"step": 150, "env_steps": 300, "eval/return": 4.0, "eval/return_std": 0.25},
    ]
    path = learning_curve(records, tmp_path / "deep" / "curve.png", title="a run")
    assert is_picture(path)
    axis = drawn[0][1][0, 0]
    collected, evaluated = axis.lines
    np.testing.assert_array_equal(collected.get_xydata(), [[100, 1], [250, 2]])
    np.testing.assert_array_equal(evaluated.get_xydata(), [[200, 3], [300, 4]])
    band = axis.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (2.5, 4.25)
    assert axis.get_xlabel() == "environment steps"


def test_offline_every_loss_term_has_its_panel(tmp_path, drawn):
    records = [{"step": s, "env_steps": 0, "train/loss": 3.0 / s, "train/loss/reward": 1.0 / s} for s in (1, 2, 3)]
    records.append({"step": 3, "eval/loss": 2.0})
    assert is_picture(learning_curve(records, tmp_path / "curve.png"))
    titles = [axis.get_title(loc="left") for axis in drawn[0][1].flat]
    assert titles == ["total loss", "reward", ""]
    total = drawn[0][1].flat[0]
    np.testing.assert_allclose(total.lines[0].get_xydata(), [[1, 3], [2, 1.5], [3, 1]])
    np.testing.assert_allclose(total.lines[1].get_xydata(), [[3, 2]])
    assert total.get_xlabel() == "updates"


def test_records_without_a_curve_are_an_error(tmp_path):
    with pytest.raises(DataError, match="no curve"):
        learning_curve([{"step": 1, "fps/update": 3.0}], tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("shape", [(2,), (16, 20, 3), (1, 16, 20), (9, 16, 16)])
def test_open_loop_pictures_of_vectors_and_images(shape, tmp_path):
    truth = np.random.default_rng(0).uniform(size=(4, 10, *shape)).astype(np.float32)
    report = OpenLoop({"obs": truth[:, ::-1]}, {"obs": truth}, observed=4)
    assert is_picture(draw_open_loop(report, tmp_path / "open_loop.png", title="a model"))


@pytest.mark.parametrize("channels_first", [False, True])
def test_images_that_are_not_square_are_shown_upright(channels_first, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda self, picture, **_: shown.append(picture))
    truth = np.random.default_rng(0).uniform(size=(1, 2, 32, 40, 3)).astype(np.float32)
    given = np.moveaxis(truth, -1, 2) if channels_first else truth
    report = OpenLoop({"obs": given}, {"obs": given}, observed=1)
    draw_open_loop(report, tmp_path / "open_loop.png", title="a model")
    np.testing.assert_array_equal(shown[0][:32, :40], truth[0, 0])
    line = report.strip().shape[0] - 3 * 32
    np.testing.assert_array_equal(report.strip()[line : line + 32, :40], np.round(truth[0, 0] * 255))


def test_stacked_channels_first_images_show_their_first_channel():
    truth = np.random.default_rng(0).uniform(size=(1, 2, 4, 64, 64)).astype(np.float32)
    strip = OpenLoop({"obs": truth}, {"obs": truth}, observed=1).strip()
    assert strip.shape[1] == 2 * 64


def test_traces_show_truth_and_prediction(tmp_path, drawn):
    truth = np.arange(12.0).reshape(1, 6, 2)
    draw_open_loop(OpenLoop({"obs": truth + 0.5}, {"obs": truth}, observed=2), tmp_path / "open_loop.png")
    for entry, axis in enumerate(drawn[0][1].flat):
        happened, predicted = (line.get_ydata() for line in axis.lines)
        np.testing.assert_array_equal(happened, truth[0, :, entry])
        np.testing.assert_array_equal(predicted, truth[0, :, entry] + 0.5)


def test_horizon_errors_are_those_of_single_steps(tmp_path):
    model = create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=2)
    rng = np.random.default_rng(0)
    batch = {
        "obs": rng.normal(size=(5, 4, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (5, 4, 2)).astype(np.float32),
        "rewards": rng.normal(size=(5, 4)).astype(np.float32),
    }
    errors = horizon_errors(model, batch)
    latents = np.stack([model.encode(batch["obs"][:, t]).features for t in range(4)])
    spread = np.sqrt(latents.var((0, 1)).mean())
    state = model.encode(batch["obs"][:, 0])
    for t in range(1, 4):
        reward = model.imagine(state, batch["actions"][None, :, t - 1]).rewards[0]
        state = model.predict(state, batch["actions"][:, t - 1])
        distance = np.sqrt(np.mean((np.asarray(state.features) - latents[t]) ** 2)) / spread
        np.testing.assert_allclose(errors.imagined["latent"][t - 1], distance, rtol=1e-4)
        np.testing.assert_allclose(
            errors.imagined["reward"][t - 1], np.sqrt(np.mean((reward - batch["rewards"][:, t]) ** 2)), rtol=1e-4
        )
        still = np.sqrt(np.mean((batch["rewards"][:, 0] - batch["rewards"][:, t]) ** 2))
        np.testing.assert_allclose(errors.still["reward"][t - 1], still, rtol=1e-5)
    assert errors.imagined["value"].shape == (3,)
    assert is_picture(draw_horizon_errors(errors, tmp_path / "horizon.png", title="a model"))
    with pytest.raises(DataError, match="2 rows"):
        horizon_errors(model, {name: x[:, :1] for name, x in batch.items()})


def test_gif_keeps_frames_order_and_speed(tmp_path):
    frames = [np.full((20, 30, 3), shade, np.uint8) for shade in range(0, 250, 25)]
    with Image.open(save_gif(frames, tmp_path / "deep" / "a.gif", fps=10, max_side=120)) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (10, (120, 80), 100, 0)
        for index, frame in enumerate(frames):
            gif.seek(index)
            assert np.abs(np.asarray(gif.convert("RGB"), int) - frame[0, 0]).max() <= 2


def test_long_and_large_videos_shrink_but_keep_the_end(tmp_path):
    frames = [np.full((64, 32, 3), 20 * (index % 10), np.uint8) for index in range(99)]
    frames.append(np.full((64, 32, 3), 250, np.uint8))
    with Image.open(save_gif(frames, tmp_path / "a.gif", fps=50, max_side=16, max_frames=30)) as gif:
        assert gif.size == (8, 16)
        assert gif.n_frames == 26
        assert gif.info["duration"] == 80
        gif.seek(gif.n_frames - 1)
        assert abs(int(np.asarray(gif.convert("RGB"))[0, 0, 0]) - 250) <= 2


@pytest.mark.parametrize(
    ("frames", "options", "error"),
    [
        ([], {}, DataError),
        ([np.zeros((4, 4), np.uint8)], {}, DataError),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)], {}, DataError),
        ([np.zeros((4, 4, 3), np.uint8)], {"fps": 80}, ConfigError),
        ([np.zeros((4, 4, 3), np.uint8)], {"max_frames": 0}, ConfigError),
    ],
)
def test_frames_that_are_no_video_are_refused(frames, options, error, tmp_path):
    with pytest.raises(error):
        save_gif(frames, tmp_path / "a.gif", **options)
    assert not list(tmp_path.iterdir())


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"worldloom\[video\]"):
        save_gif([np.zeros((4, 4, 3), np.uint8)], tmp_path / "a.gif")
    with pytest.raises(MissingDependencyError, match=r"worldloom\[video\]"):
        learning_curve([{"step": 1, "train/loss": 3.0}], tmp_path / "curve.png")


def test_of_several_records_at_one_place_the_last_one_is_drawn():
    records = [{"step": step, "env_steps": 1000, "collect/return": float(step)} for step in (250, 500, 750)]
    x, y = points([*records, {"step": 800, "env_steps": 1050, "collect/return": 9.0}], "collect/return")
    np.testing.assert_array_equal(x, [1000, 1050])
    np.testing.assert_array_equal(y, [750, 9])


def test_a_loss_term_that_is_always_zero_has_no_panel(tmp_path, drawn):
    records = [{"step": s, "train/loss": 1.0, "train/loss/reward": 1.0, "train/loss/termination": 0.0} for s in (1, 2)]
    learning_curve(records, tmp_path / "curve.png")
    assert [axis.get_title(loc="left") for axis in drawn[0][1].flat if axis.axison] == ["total loss", "reward"]


def test_traces_are_named_and_their_colours_and_styles_explained(tmp_path, drawn):
    truth = np.random.default_rng(0).normal(size=(2, 6, 3))
    report = OpenLoop({"obs": truth}, {"obs": truth}, observed=2)
    draw_open_loop(report, tmp_path / "a.png", entry_names=entry_names("Pendulum-v1"))
    figure, axes = drawn[0]
    assert [axis.get_title(loc="left") for axis in axes.flat] == [*entry_names("Pendulum-v1")]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["sequence 1", "sequence 2", "recorded", "model", "the model imagines"]
    draw_open_loop(report, tmp_path / "b.png", entry_names=("one", "two"))
    assert drawn[1][1].flat[0].get_title(loc="left") == "obs[0]"


def test_entries_are_named_for_ids_of_known_environments():
    assert entry_names("CartPole-v1")[2] == "pole angle (rad)"
    for spec in ("dmc:walker-walk", "Unknown-v0", "module:Pendulum-v1", None, len):
        assert entry_names(spec) == ()


def test_sequences_in_a_plot_have_no_row_in_common():
    ids = np.array([[0, 1, 2], [2, 3, 4], [10, 11, 12], [1, 2, 3], [20, 21, 22], [30, 31, 32]])
    np.testing.assert_array_equal(_separate_windows(ids), ids[[0, 2, 4]])
    np.testing.assert_array_equal(_separate_windows(ids[[0, 0]]), ids[:1])
