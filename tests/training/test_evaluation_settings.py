"""When a run is evaluated, on how many episodes, and how: settings of ``TrainingConfig``."""

import dataclasses
import json

import pytest
from online_worlds import ONLINE_CONFIG, Glide, MeasurementRecorder, toy
from tiny_envs import Walk
from toy_family import ALGORITHM, ToyWorldModel

from worldloom.envs import make_env
from worldloom.training import Trainer, TrainingConfig
from worldloom.training.callbacks import EvalCallback
from worldloom.training.evaluation import measure_returns, play
from worldloom.training.run_folder import RunFolder


class Noisy(ToyWorldModel):
    """The toy model, evaluated by its noisy policy."""

    algorithm = dataclasses.replace(ALGORITHM, eval_policy=None, samples_in_evaluation=True)


class Succeeding(Walk):
    def step(self, action):
        *result, info = super().step(action)
        return *result, {"success": float(self.steps > 3), **info}


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["env_steps"]) for line in lines if "eval/return" in line]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [8, 16, 20]),
        ({"eval_at_start": True}, [0, 8, 16, 20]),
        ({"eval_at_end": False}, [8, 16]),
        ({"eval_at_start": True, "eval_at_end": False, "eval_interval": 0}, [0]),
        ({"eval_interval": 10}, [10, 20]),
    ],
)
def test_a_run_folder_is_evaluated_when_its_config_says(tmp_path, changes, expected):
    config = ONLINE_CONFIG.replace(**{"total_steps": 20, "eval_interval": 8, "eval_episodes": 2, **changes})
    with make_env(Walk, 1, seed=3) as env:
        Trainer(toy(env), config, RunFolder(tmp_path).callbacks(env, progress=False)).train(env)
    found = evaluations(tmp_path)
    assert [step for step, _ in found] == expected
    if expected[0] == 0:
        assert found[0] == (0, 0)


def test_without_evaluations_no_environments_are_made_for_them(tmp_path, monkeypatch):
    config = ONLINE_CONFIG.replace(total_steps=4, eval_interval=0, eval_at_end=False)
    with make_env(Walk, 1, seed=3) as env:
        monkeypatch.setattr(type(env), "another", lambda *_, **__: pytest.fail("environments were made"))
        callbacks = RunFolder(tmp_path).callbacks(env, progress=False, evaluate=False)
        trainer = Trainer(toy(env), config, callbacks)
        trainer.train(env)
        by_default = Trainer(toy(env), config)
        by_default.train(env)
    assert evaluations(tmp_path) == []
    assert not any(isinstance(each, EvalCallback) for each in by_default._callbacks.callbacks)


def test_evaluations_may_begin_in_a_later_call():
    config = ONLINE_CONFIG.replace(eval_interval=0)
    with make_env(Walk, 1, seed=3) as env:
        trainer = Trainer(toy(env), config)
        trainer.train(env, total_steps=2)
        trainer.config = config.replace(eval_interval=1)
        trainer.train(env, total_steps=4)
        found = [each for each in trainer._callbacks.callbacks if isinstance(each, EvalCallback)]
        assert len(found) == 1
        assert "eval/return" in trainer._callbacks.measurements
        trainer.train(env, total_steps=5)
        assert sum(isinstance(each, EvalCallback) for each in trainer._callbacks.callbacks) == 1


def test_an_evaluation_at_the_start_is_not_repeated_by_a_resume(tmp_path):
    config = ONLINE_CONFIG.replace(total_steps=6, eval_interval=0, eval_episodes=1, eval_at_start=True)
    for end in (6, 9):
        with make_env(Walk, 1, seed=3) as env:
            trainer = Trainer(toy(env), config, RunFolder(tmp_path).callbacks(env, progress=False))
            trainer.train(env, total_steps=end, resume="auto")
    assert [step for step, _ in evaluations(tmp_path)] == [0, 6, 9]


@pytest.mark.parametrize(("given", "expected"), [(None, 4), (3, 3)])
def test_the_config_sets_the_number_of_episodes_unless_the_callback_does(monkeypatch, given, expected):
    counts = []
    real = play
    monkeypatch.setattr(
        "worldloom.training.evaluation.play", lambda *a, **k: counts.append(k["episodes"]) or real(*a, **k)
    )
    with make_env(Walk, 1, seed=3) as env, make_env(Walk, 2, seed=9) as other:
        config = ONLINE_CONFIG.replace(eval_episodes=4)
        Trainer(toy(env), config, [EvalCallback(other, every=5, episodes=given)]).train(env, total_steps=5)
    assert counts == [expected]


@pytest.mark.parametrize(
    ("model", "setting", "greedy"),
    [(Noisy, None, True), (Noisy, False, False), (ToyWorldModel, None, False), (ToyWorldModel, True, True)],
)
def test_greedy_returns_are_published_where_they_say_something_else(model, setting, greedy):
    recorder = MeasurementRecorder()
    with make_env(Glide, 1, seed=3) as env, make_env(Glide, 2, seed=9) as other:
        config = ONLINE_CONFIG.replace(eval_greedy=setting, eval_episodes=3)
        Trainer(toy(env, model), config, [EvalCallback(other, every=5), recorder]).train(env, total_steps=5)
    (measured,) = [record for _, _, record in recorder.records if "eval/return" in record]
    assert ("eval/greedy_return" in measured) == ("eval/greedy_return_std" in measured) == greedy
    if greedy:
        # Sampling differs from the mode where the policy samples, and nowhere else.
        assert (measured["eval/greedy_return"] != measured["eval/return"]) == (model is Noisy)


def test_greedy_episodes_are_those_of_a_policy_without_noise():
    with make_env(Glide, 2, seed=3) as env:
        noisy, plain = toy(env, Noisy), toy(env)
        plain.load_params(noisy.params)
        options = {"episodes": 4, "seed": 5}
        assert play(noisy, env, greedy=True, **options) == play(plain, env, **options)
        assert play(noisy, env, greedy=True, **options) != play(noisy, env, **options)


def test_successes_are_published_where_every_episode_reports_one():
    with make_env(Succeeding, 2, seed=3) as env:
        measured = measure_returns(toy(env), env, TrainingConfig(eval_episodes=8, device="cpu"), seed=1)
        ends = play(toy(env), env, episodes=8, seed=1)
        assert measured["eval/success"] == sum(end.length > 3 for end in ends) / 8
        assert 0 < measured["eval/success"] < 1
    with make_env(Walk, 2, seed=3) as env:
        assert "eval/success" not in measure_returns(toy(env), env, TrainingConfig(eval_episodes=2, device="cpu"))
