"""Every kind of space with both families: train, evaluate, replay, resume, and read as a Minari dataset.

Real presets, the smallest ones made smaller. The table of the page Environments has these cells. All of it is slow;
a part that holds every kind runs always.
"""

import itertools
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import jax
import numpy as np
import pytest
from gymnasium import spaces

import worldloom
from worldloom import create_world_model, from_pretrained, load_policy
from worldloom.envs import EnvSpaces, make_env
from worldloom.errors import ConfigError
from worldloom.replay import from_minari
from worldloom.spaces.actions import ActionSpec
from worldloom.spaces.joined import JoinedActions
from worldloom.training import Trainer, TrainingConfig, play, recipe
from worldloom.training.callbacks import CheckpointCallback
from worldloom.training.checkpoint_files import flatten_state

LENGTH = 6
SMALLER = {
    "dreamerv3:tiny": {
        "deter_dim": 32,
        "stoch_dim": 16,
        "num_categories": 4,
        "hidden_dim": 16,
        "cnn_depth": 4,
        "blocks": 4,
        "mlp_layers": 1,
        "bins": 15,
        "imagination_horizon": 3,
        "imagination_starts": 2,
    },
    "tdmpc2:tiny": {
        "hidden_dim": 16,
        "encoder_dim": 16,
        "horizon": 2,
        "num_samples": 16,
        "num_elites": 4,
        "num_pi_trajs": 2,
        "iterations": 1,
    },
}
TRAINING = TrainingConfig(batch_size=2, sequence_length=5, prefill=20, log_interval=2, eval_interval=0, device="cpu")

VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float64)
OBSERVATIONS = {
    "Box of floats": VECTOR,
    "Box of integers": spaces.Box(-3, 9, (4,), np.int32),
    "matrix": spaces.Box(-1, 1, (2, 3), np.float64),
    "image": spaces.Box(0, 255, (64, 64, 3), np.uint8),
    "Discrete": spaces.Discrete(4, start=2),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3], start=[0, 5]),
    "MultiBinary": spaces.MultiBinary((2, 2)),
    "nested Dict": spaces.Dict(robot=spaces.Dict({"arm": VECTOR, "a.b": spaces.Discrete(2)}), __class__=VECTOR),
    "Tuple": spaces.Tuple([spaces.MultiBinary(2), spaces.Dict(x=spaces.Box(0, 1, (2, 2)))]),
    "Dict with text": spaces.Dict(say=spaces.Text(5), arm=VECTOR),
    "image and vector": spaces.Dict(camera=spaces.Box(0, 255, (64, 64, 3), np.uint8), arm=VECTOR),
}
ACTIONS = {
    "Box of floats": spaces.Box(np.array([-2.0, 0]), np.array([4.0, 1e3]), dtype=np.float64),
    "Box of integers": spaces.Box(-3, 9, (2,), np.int64),
    "Box without bounds": spaces.Box(np.float32([-np.inf, 1]), np.float32([np.inf, np.inf])),
    "Box with a fixed entry": spaces.Box(np.float32([-2, 3]), np.float32([4, 3])),
    "matrix": spaces.Box(-2, 1, (2, 2)),
    "Discrete": spaces.Discrete(3, start=-1),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3], start=[0, 5]),
    "MultiBinary": spaces.MultiBinary(2),
    "Dict of Boxes": spaces.Dict(arm=spaces.Dict({"x.y": spaces.Box(-2, 1, (2,))}), leg=spaces.Box(0, np.inf, (1,))),
    "Dict": spaces.Dict({"arm/left": spaces.Box(-2, 1, (2,)), "__class__": spaces.Discrete(2)}),
    "Tuple": spaces.Tuple([spaces.Discrete(2), spaces.MultiDiscrete([2, 2])]),
}
EVERYTHING = spaces.Tuple([space for kind, space in OBSERVATIONS.items() if "image" not in kind])
ALL_ACTIONS = spaces.Tuple(list(ACTIONS.values()))

ONE_ACTION = ("tdmpc2:tiny",)
"""Models that take one action: several are joined."""
PAGE = Path(worldloom.__file__).parent / "docs" / "environments.md"


def table(title):
    """The marks of a table of the page: {kind: {preset: cell}}."""
    lines = PAGE.read_text(encoding="utf-8").partition(f"| {title} | DreamerV3 | TD-MPC2 |")[2].splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]
    return {kind: dict(zip(SMALLER, cells, strict=True)) for kind, *cells in rows}


def test_the_page_lists_every_kind():
    assert list(table("observations")) == list(OBSERVATIONS)
    assert list(table("actions")) == list(ACTIONS)
    assert all(cell.startswith("✓") for cells in table("observations").values() for cell in cells.values())


class Recorded(gym.Env):
    """Random observations, episodes of six steps; keeps the actions that it was given in :attr:`log`."""

    log = None

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        obs = self._observe()
        if self.log is not None:
            self.log.append((obs, action))
        return obs, float(self.steps), False, self.steps == LENGTH, {}

    def _observe(self):
        obs = self.observation_space.sample()
        if self.log is not None and self.steps == 0:
            self.log.append((obs, None))
        return obs


def options_for(observation_space, action_space, family):
    """The options of ``make_env`` that these spaces need."""
    texts = ["say"] if "say" in str(observation_space) else []
    if isinstance(observation_space, spaces.Tuple) and texts:
        texts = [f"{list(observation_space.spaces).index(OBSERVATIONS['Dict with text'])}/say"]
    several = not isinstance(action_space, spaces.Box | spaces.Discrete)
    unbounded = "inf" in str(action_space)
    return {
        "drop_keys": texts,
        "action_bounds": (-4, 10) if unbounded else None,
        "join_actions": several and family in ONE_ACTION,
    }


def run(env, family, folder, *, seed=3):
    """A trainer of the smaller preset in ``env``, which saves into ``folder``."""
    fields = recipe(family, env).model
    model = create_world_model(family, **{**fields, **SMALLER[family]}, seed=seed, device="cpu", precision="float32")
    config = TRAINING.replace(sequence_length=4) if family.startswith("tdmpc2") else TRAINING
    return Trainer(model, config, [CheckpointCallback(str(folder), save_every=2)])


def check(observation_space, action_space, family, tmp_path, monkeypatch):
    """All cells of the table for one pair of spaces and one family."""
    options = options_for(observation_space, action_space, family)
    log = []

    def build():
        return Recorded(observation_space, action_space)

    env = make_env(build, seed=5, **options)

    # Train, recording what the environment received, and what replay holds.
    monkeypatch.setattr(Recorded, "log", log)
    trainer = run(env, family, tmp_path / "run")
    trainer.train(env, total_steps=4)
    monkeypatch.setattr(Recorded, "log", None)
    episodes = split(log)
    stored = [each for each in trainer.replay.episodes() if each["is_last"][-1]]
    actions = ActionSpec(env.action_space)
    observed = env._observations
    assert len(stored) >= 3
    for recorded, rows in zip(episodes, stored, strict=False):
        for step, (obs, action) in enumerate(recorded):
            expected = observed.unwrap(observed.flatten(obs))
            jax.tree.map(np.testing.assert_array_equal, expected, jax.tree.map(lambda x, t=step: x[t], rows["obs"]))
            if action is not None:
                agent = jax.tree.map(lambda x, t=step: x[t - 1 : t], rows["actions"])
                executed = actions.to_env(actions.check(agent, np.zeros(1, bool)))
                native = JoinedActions(action_space).split(executed) if options["join_actions"] else executed
                jax.tree.map(np.testing.assert_array_equal, first(native), action)

    # Evaluate.
    (end,) = play(trainer.model, env.another(1, 9), episodes=1)
    assert end.length == LENGTH

    # Resume: the same weights and rows as without an interruption.
    again = make_env(build, seed=5, **options)
    resumed = run(again, family, tmp_path / "run", seed=0)
    resumed.train(again, total_steps=4, resume=tmp_path / "run" / "2")
    one, other = flatten_state(jax.device_get(trainer.state)), flatten_state(jax.device_get(resumed.state))
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)
    assert len(trainer.replay) == len(resumed.replay)

    # Save, load and act.
    trainer.model.remember_env_spaces(EnvSpaces.underneath(env).to_json())
    saved = trainer.model.save_pretrained(tmp_path / "model")
    assert from_pretrained(saved).num_parameters() == trainer.model.num_parameters()
    obs, _ = build().reset(seed=1)
    assert env.action_space.contains(load_policy(saved, device="cpu")(obs))

    # Minari: the same recordings as a dataset give the same rows, and train.
    buffer = from_minari(as_minari(episodes, observation_space, action_space), **options)
    for row, expected in zip(buffer.episodes(), stored, strict=False):
        for name in ("obs", "rewards"):
            jax.tree.map(np.testing.assert_array_equal, row[name], expected[name])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), row["actions"], expected["actions"])
    offline = run(env, family, tmp_path / "offline")
    offline.train(buffer, total_steps=2)
    assert offline.step == 2


def first(value):
    """The action of the only environment."""
    if isinstance(value, dict):
        return {key: first(inner) for key, inner in value.items()}
    return tuple(map(first, value)) if isinstance(value, tuple) else value[0]


def split(log):
    """Whole episodes of a log: lists of observations, each with the action that led to it."""
    starts = [i for i, (_, action) in enumerate(log) if action is None]
    return [log[i : i + LENGTH + 1] for i in starts if len(log) >= i + LENGTH + 1]


def as_minari(episodes, observation_space, action_space):
    """Episodes as Minari has them."""

    def read(episode):
        return SimpleNamespace(
            observations=stack([obs for obs, _ in episode]),
            actions=stack([action for _, action in episode[1:]]),
            rewards=np.arange(1.0, LENGTH + 1),
            terminations=np.zeros(LENGTH, bool),
            truncations=np.arange(LENGTH) == LENGTH - 1,
        )

    return SimpleNamespace(
        observation_space=observation_space,
        action_space=action_space,
        iterate_episodes=lambda: map(read, episodes),
    )


def stack(values):
    """Values of a space along a new axis, as Minari stacks them; texts stay a list."""
    head = values[0]
    if isinstance(head, dict):
        return {key: stack([value[key] for value in values]) for key in head}
    if isinstance(head, tuple):
        return tuple(stack(list(entries)) for entries in zip(*values, strict=True))
    return values if isinstance(head, str) else np.stack([np.asarray(value) for value in values])


FAMILIES = list(SMALLER)


def test_everything_at_once_trains_dreamerv3(tmp_path, monkeypatch):
    check(EVERYTHING, ALL_ACTIONS, "dreamerv3:tiny", tmp_path, monkeypatch)


def test_classes_and_joined_actions_without_bounds_train_tdmpc2(tmp_path, monkeypatch):
    check(OBSERVATIONS["MultiDiscrete"], ACTIONS["Dict of Boxes"], "tdmpc2:tiny", tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_observations_of_every_kind_train_every_family(kind, family, tmp_path, monkeypatch):
    check(OBSERVATIONS[kind], ACTIONS["Box of floats"], family, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ACTIONS)
def test_actions_of_every_kind_train_every_family(kind, family, tmp_path, monkeypatch):
    if not table("actions")[kind][family].startswith("✓"):
        with pytest.raises(ConfigError, match="there is none in place of continuous and discrete"):
            make_env(lambda: Recorded(VECTOR, ACTIONS[kind]), join_actions=True)
        return
    check(VECTOR, ACTIONS[kind], family, tmp_path, monkeypatch)
