"""Published experiments: settings equal to the transcribed ones, and what a run changes of them is told."""

import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import worldloom
from worldloom.algorithm import ScoreRule
from worldloom.cli.train import _flags
from worldloom.config import FrozenMapping
from worldloom.envs import make_env
from worldloom.envs.make import SUITES, _Suite
from worldloom.errors import ConfigError, UnknownFieldError
from worldloom.families import get_family
from worldloom.models.dreamer import DreamerV3Config
from worldloom.models.dreamer import recipes as dreamer_recipes
from worldloom.models.registry import get_config
from worldloom.training import TrainingConfig, protocol
from worldloom.training.protocols import find_protocol, protocol_names
from worldloom.training.recipes import recipe
from worldloom.training.train_ratio import TrainRatio

PAGE = Path(__file__).parents[1] / "data" / "protocols.md"
"""Settings of the reference programs, transcribed from their sources."""


def transcribed():
    """The table of the page, with entries that are ``like`` others completed."""
    namespace = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)[1], namespace)
    table = namespace["PROTOCOLS"]
    for name, entry in table.items():
        if "like" in entry:
            base = table[entry["like"]]
            fields = {key: {**base.get(key, {}), **entry.get(key, {})} for key in ("training", "model_fields")}
            table[name] = {**base, **entry, **fields}
    return table


TABLE = transcribed()


def test_every_transcribed_protocol_exists_and_no_other():
    # Families of other tests may have taken these protocols over.
    built_in = {name for name in protocol_names() if name.partition("/")[0] in ("dreamerv3", "tdmpc2")}
    assert built_in == set(TABLE)


@pytest.mark.parametrize("name", [name for name, entry in TABLE.items() if "offline" not in entry])
def test_a_protocol_has_the_transcribed_settings(name):
    found, entry = find_protocol(name), TABLE[name]
    family = name.partition("/")[0]
    assert f"{family}:{found.size}" == entry["model"]
    assert "|".join(found.envs) == entry["env"]
    options = {"num_envs": entry["num_envs"], "action_repeat": entry["action_repeat"], **entry.get("env_options", {})}
    options |= {"frame_stack": entry["frame_stack"]} if "frame_stack" in entry else {}
    assert dict(found.env_options) == options
    # What the config has by default need not be transcribed.
    default = get_config(f"{family}:{found.size}", obs_shape=(3,), action_dim=2)
    assert dict(found.model_fields) == {
        **{field: getattr(default, field) for field in found.model_fields},
        **entry.get("model_fields", {}),
    }
    # What depends on the length of an episode is the recipe's; how often to evaluate is ours where nothing is said.
    own = {"eval_interval", "eval_at_start", "eval_episodes"}
    expected = {field: value for field, value in entry["training"].items() if not isinstance(value, str)}
    training = dict(found.training)
    assert {field: training[field] for field in expected} == expected
    assert set(training) - set(expected) <= own
    # It can be built: all names are fields.
    TrainingConfig(**training)
    get_config(f"{family}:{found.size}", obs_shape=(3,), action_dim=2, **found.model_fields)
    spec = get_family(family).algorithm.replay_spec(
        get_config(f"{family}:tiny", obs_shape=(3,), action_dim=2), TrainingConfig(**training)
    )
    assert spec.fresh_first == entry.get("online_queue", False)
    assert spec.open_episodes == entry.get("open_episodes", True)


@pytest.mark.parametrize("name", ["tdmpc2/mt30", "tdmpc2/mt80"])
def test_an_offline_protocol_says_what_it_needs(name):
    found, entry = find_protocol(name), TABLE[name]
    assert entry["offline"].split(",")[0].split(" of ")[0] in found.data
    assert entry["offline"].split("episodes of ")[1] in found.data
    assert dict(found.model_fields) == entry["model_fields"]
    assert found.training["batch_size"] == entry["training"]["batch_size"]
    with pytest.raises(ConfigError, match=r"trained from recorded data \(\d+ GB"):
        protocol(name, "dmc:walker_walk")


def test_score_rules_are_those_of_the_programs():
    for generation in ("atari100k", "atari100k@2024"):
        assert find_protocol(f"dreamerv3/{generation}").score[:2] == ("training", (390_000, 400_000))
    assert find_protocol("dreamerv3/crafter").score.source == "achievements"
    assert find_protocol("tdmpc2/dmc").score.source == "evaluation"
    assert all(isinstance(find_protocol(name).score, ScoreRule) for name in protocol_names())


def test_train_ratios_of_recipes_are_those_of_the_protocols():
    for name in protocol_names():
        found = find_protocol(name)
        if name.startswith("dreamerv3/"):
            suite = found.envs[0].partition(":")[0]
            ratio = dreamer_recipes._RATIOS[suite, found.env_options["action_repeat"]]
            assert ratio == found.training["train_ratio"], name


def test_gymnasium_tasks_of_the_protocol_begin_with_five_episodes():
    experiment = protocol("tdmpc2/gym", "Pendulum-v1")
    with experiment.make_env(time_limit=300) as env:
        training = experiment.recipe(env).training
    assert training["prefill"] == training["prefill_updates"] == 5 * 300


def test_published_curves_belong_to_their_environments():
    tdmpc2, dreamer = (get_family(family).algorithm.published_curve for family in ("tdmpc2", "dreamerv3"))
    curve = tdmpc2("tdmpc2", "dmc:cartpole_swingup")
    assert (curve.steps[1], round(curve.low[1]), round(curve.high[1])) == (100_000, 790, 868)
    assert tdmpc2("tdmpc2", "dmc:cup-catch") == tdmpc2("tdmpc2", "dmc:ball_in_cup_catch") is not None
    curve = dreamer("dreamerv3_proprio", "dmc:cartpole_balance")
    assert (curve.steps[0], curve.mean[0], curve.steps[-1]) == (20_000, 316.3, 500_000)
    for env in ("dmc:no_such_task", "dmc_vision:cartpole_swingup", "Pendulum-v1", "cartpole_swingup"):
        assert tdmpc2("tdmpc2", env) is None
        assert dreamer("dreamerv3_proprio", env) is None


@pytest.mark.parametrize(
    ("name", "env", "message"),
    [
        ("dreamerv3/atari200k", "atari100k:pong", "Did you mean 'dreamerv3/atari"),
        ("atari100k", None, "There is no protocol 'atari100k'"),
        ("dreamerv3/atari100k", None, r"needs an environment: atari100k:\*"),
        ("tdmpc2/gym", None, "needs an environment: Walker2d-v5 or"),
        (3, "Pendulum-v1", r"named by text such as 'tdmpc2/dmc', not 3\.$"),
        (None, None, r"named by text such as 'tdmpc2/dmc', not None\.$"),
        ("dreamerv3/atari", 5, r"env must be the name of an environment, such as 'dmc:walker_walk', not 5\.$"),
        ("dreamerv3/crafter", gym.Env, "env must be the name of an environment"),
    ],
)
def test_a_protocol_that_cannot_be_is_refused(name, env, message):
    with pytest.raises(ConfigError, match=message):
        protocol(name, env)


def test_the_only_environment_of_a_protocol_need_not_be_named():
    experiment = protocol("dreamerv3/crafter")
    assert (experiment.model, experiment.env, experiment.in_scope) == ("dreamerv3:size200m", "crafter:reward", True)
    assert not protocol("tdmpc2/gym", "Pendulum-v1").in_scope
    assert protocol("tdmpc2/gym", "Walker2d-v5").in_scope


def test_the_program_on_the_page_runs_up_to_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Path(worldloom.__file__).parent / "docs" / "protocols.md"
    program = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)[0]
    # The smallest preset in place of the published one: the program is the same.
    shown = program.replace("create_world_model(experiment.model", 'create_world_model("tdmpc2:tiny"')
    namespace: dict = {}
    exec(compile(shown.partition("trainer.train(")[0], str(page), "exec"), namespace)
    with namespace["env"] as env:
        trainer = namespace["trainer"]
        config = trainer.config
        assert (config.env_steps, config.batch_size, config.eval_at_start) == (20_000, 256, True)
        told = namespace["experiment"].changes(trainer.model.config, trainer.config, env)
        assert told["env_steps"] == [4_000_000, 20_000]


def test_the_commands_on_the_page_are_valid():
    page = Path(worldloom.__file__).parent / "docs" / "protocols.md"
    shown = re.findall(r"^\$ worldloom (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    assert {line.split()[0] for line in shown} == {"list", "train", "score"}
    for line in shown:
        if line.startswith("train"):
            flags = _flags(None).parse(line.split()[1:])
            assert protocol(flags["protocol"], flags["env"]).in_scope


def changes(fields=None, env_fields=None, *, name="tdmpc2/gym", env="Pendulum-v1"):
    """What a run with ``fields`` of its configs and of ``make_env`` changes of a protocol."""
    experiment = protocol(name, env)
    with experiment.make_env(**(env_fields or {})) as made:
        model, training, _ = experiment.recipe(made, fields)
        config = get_config(experiment.model, **model)
        return experiment.changes(config, TrainingConfig(**training), made)


def test_a_run_as_published_changes_nothing_but_its_environment():
    assert set(changes()) == {"env"}
    # Where and how it is computed, and with which seed, is not part of an experiment.
    free = {"seed": 7, "device": "cpu", "log_interval": 3, "microbatches": 2, "save_interval": 0}
    assert set(changes(free, {"seed": 3, "worker_timeout": 9.0})) == {"env"}


def test_what_is_given_wins_and_is_told():
    found = changes({"batch_size": 8, "rho": 0.5, "learning_rate": 3e-4}, {"num_envs": 2, "time_limit": 50})
    assert found.pop("env")[1] == "Pendulum-v1"
    assert {name: found[name] for name in ("batch_size", "rho", "num_envs", "time_limit")} == {
        "batch_size": [256, 8],
        "rho": [0.7, 0.5],
        "num_envs": [1, 2],
        "time_limit": [200, 50],
    }
    assert "learning_rate" not in found  # given, and equal to the protocol's


def test_a_number_of_updates_replaces_the_budget_of_environment_steps():
    experiment = protocol("tdmpc2/gym", "Pendulum-v1")
    with experiment.make_env() as env:
        training = experiment.recipe(env, {"total_steps": 300}).training
        assert (training["total_steps"], training["env_steps"]) == (300, 0)
        both = experiment.recipe(env, {"total_steps": 300, "env_steps": 20_000}).training
        assert (both["total_steps"], both["env_steps"]) == (300, 20_000)
    # One update per decision step, and as many as prefill steps at once: 4,000,000 in all.
    assert changes({"total_steps": 300})["total_steps"] == [4_000_000, 300]
    assert set(changes({"total_steps": 4_000_000})) == {"env"}
    assert "env_steps" not in changes({"total_steps": 300})
    # It has no effect beside environment steps.
    assert set(changes({"total_steps": 300, "env_steps": 4_000_000})) == {"env"}
    assert changes({"env_steps": 7_000})["env_steps"] == [4_000_000, 7_000]


def test_given_fields_are_in_the_config_that_has_them_or_are_refused():
    experiment = protocol("tdmpc2/gym", "Pendulum-v1")
    with experiment.make_env() as env:
        model, training, reasons = experiment.recipe(env, {"horizon": 5, "seed": 7, "rho": 0.6})
        assert (model["horizon"], model["rho"], training["seed"]) == (5, 0.6, 7)
        assert not {"horizon", "rho", "seed"} & {*reasons}
        with pytest.raises(UnknownFieldError, match="Did you mean 'horizon'"):
            experiment.recipe(env, {"horizont": 5})


def test_outside_its_environments_published_values_are_still_those_of_the_protocol():
    found = changes(name="tdmpc2/dmc", env="CartPole-v1")
    assert found.pop("env") == ["dmc:*", "CartPole-v1"]
    # What the reference has no settings for: discrete actions, and episodes that end.
    assert found == {
        "entropy_coef": [1e-4, 1e-3],
        "tau": [0.01, 0.03],
        "value_coef": [0.1, 1.0],
        "consistency_coef": [20.0, 4.0],
        "encoder_lr_scale": [0.3, 1.0],
        "episodic": [False, True],
    }
    # A suite's own values go wherever its protocol goes.
    assert set(changes(name="tdmpc2/dmc", env="MountainCarContinuous-v0")) == {"env", "episodic"}
    assert changes({"rho": 0.7}, name="tdmpc2/dmc", env="Pendulum-v1")["rho"] == [0.5, 0.7]


def test_more_environments_change_nothing_but_their_number_and_what_it_takes():
    found = changes(env_fields={"num_envs": 300})
    assert found["num_envs"] == [1, 300]
    assert found["prefill"] == [1_000, 300 * 6]  # a window in each


@pytest.mark.parametrize(
    ("name", "env", "given", "told"),
    [
        ("tdmpc2/gym", "Pendulum-v1", {"time_limit": 200}, set()),
        ("tdmpc2/gym", "Pendulum-v1", {"time_limit": 100}, {"time_limit"}),
        ("tdmpc2/gym", "Pendulum-v1", {"num_envs": 1, "action_repeat": 1, "on_bad_step": "stop"}, set()),
        ("tdmpc2/gym", "Pendulum-v1", {"join_actions": False, "g": 9.5}, {"g"}),
        ("tdmpc2/gym", "stroll:left", {"wind": 0.0, "stormy": False, "time_limit": 9}, set()),
        ("tdmpc2/gym", "stroll:left", {"wind": 1.0, "stormy": True, "time_limit": 8}, {"wind", "stormy", "time_limit"}),
    ],
)
def test_giving_an_environment_what_it_has_anyway_is_no_change(name, env, given, told, monkeypatch):
    monkeypatch.setitem(SUITES, "stroll", _Suite("test_protocols:make_stroll", "gymnasium", 1))
    assert set(changes(env_fields=given, name=name, env=env)) - {"env"} == told


class Suite(gym.Env):
    """A suite's task with a time limit of its own."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, time_limit):
        self.time_limit = 9 if time_limit is None else time_limit


def make_stroll(task, *, wind=0.0, stormy=False, action_repeat=1, time_limit=None):
    return Suite(time_limit)


USUAL = {"stroll": {"wind": 0.0, "stormy": False}}


@pytest.mark.parametrize(
    ("name", "env", "tiny"),
    [("dreamerv3/crafter", "CartPole-v1", "dreamerv3:tiny"), ("tdmpc2/gym", "CartPole-v1", "tdmpc2:tiny")],
)
def test_a_smaller_model_changes_sizes_alone(name, env, tiny):
    experiment = protocol(name, env)
    with experiment.make_env() as made:
        model, training, _ = experiment._replace(model=tiny).recipe(made)
        assert (model, training) == experiment.recipe(made)[:2]
        sizes = {
            field
            for field, value in vars(get_config(tiny, **model)).items()
            if value != getattr(get_config(experiment.model, **model), field)
        }
        found = experiment.changes(get_config(tiny, **model), TrainingConfig(**training), made)
        published = experiment.changes(get_config(experiment.model, **model), TrainingConfig(**training), made)
        assert set(found) == sizes | set(published)
        assert not {"kl_free", "slow_critic_rate", "lr_schedule", "learning_rate", "rho", "prefill"} & set(found)
        assert sizes > {"hidden_dim"}


def test_evaluations_count_only_where_they_are_what_is_scored():
    assert changes({"eval_episodes": 3})["eval_episodes"] == [10, 3]
    assert "eval_interval" not in changes({"eval_interval": 77}, name="dreamerv3/dmc-proprio")


def test_protocols_cannot_be_changed_by_accident():
    with pytest.raises((AttributeError, TypeError)):
        find_protocol("tdmpc2/dmc").training["batch_size"] = 3
    with pytest.raises(AttributeError):
        find_protocol("tdmpc2/dmc").size = "1m"
    assert isinstance(find_protocol("tdmpc2/dmc").training, FrozenMapping)


@given(
    prefill=st.integers(1, 500),
    burst=st.integers(0, 500),
    ratio=st.floats(0.5, 2_000),
    rows=st.integers(1, 2_000),
    updates=st.integers(1, 5_000),
)
def test_the_decision_steps_of_a_budget_are_the_first_with_its_updates(prefill, burst, ratio, rows, updates):
    schedule = TrainRatio(prefill, burst, ratio, rows)
    steps = schedule.decisions(updates)
    assert schedule.updates(steps) >= updates
    assert steps == prefill or schedule.updates(steps - 1) < updates


def test_gymnasium_tasks_have_the_settings_of_the_reference_except_for_the_tiny_size():
    with make_env("CartPole-v1") as env:
        found = recipe("tdmpc2:5m", env)
        assert (found.model["discount_max"], found.model["rho"]) == (0.99, 0.7)
        assert found.training["prefill"] == found.training["prefill_updates"] == 5 * 500
        tiny = recipe("tdmpc2:tiny", env)
        assert not {"discount_max", "rho"} & set(tiny.model)
        assert tiny.training["prefill"] == 1_000


def test_recipes_carry_the_weights_of_the_reference():
    with make_env("CartPole-v1") as env:
        for size in ("tiny", "size12m"):
            model = dreamer_recipes.recipe(size, env, {}).model
            assert model["kl_scale"] * model["kl_balance"] == pytest.approx(1.0)
            assert model["kl_scale"] * (1 - model["kl_balance"]) == pytest.approx(0.1)
        assert dreamer_recipes.recipe("size12m", env, {"kl_balance": 0.8}).model["kl_balance"] == 0.8


def test_options_of_a_suite_are_left_out_in_other_environments_and_said():
    experiment = protocol("dreamerv3/atari", "CartPole-v1")
    assert "noops" in experiment.protocol.env_options
    assert "noops" not in experiment.env_options
    env = experiment.make_env(num_envs=1)
    model, training, _ = recipe("dreamerv3:tiny", env)
    changes = experiment.changes(DreamerV3Config.from_size("tiny", **model), TrainingConfig(**training), env)
    assert changes["noops"] == [30, None]
    assert changes["env"][1] == "CartPole-v1"


def test_what_an_environment_lacks_is_said_to_be_the_protocols():
    with pytest.raises(ConfigError, match=r"frame_stack.* The protocol tdmpc2/dmc-pixels asks for .*frame_stack=3"):
        protocol("tdmpc2/dmc-pixels", "Pendulum-v1").make_env()
