"""Members of a published family are the single runs of their seeds, up to rounding, as long as rows are the same."""

import os

import numpy as np
import pytest

from worldloom import create_world_model
from worldloom.envs import make_env
from worldloom.models.params import flatten
from worldloom.training import Trainer, TrainingConfig, many, recipe, train_many
from worldloom.training.callbacks import Callback

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("WORLDLOOM_TEST_OPTIMIZED") != "1",
        reason="the tests' quick code generator rounds two programs differently; run this with XLA's usual one",
    ),
]

SPEC, UPDATES, SEEDS = "jax:Pendulum-v1", (1, 10, 100), range(8)


class Weights(Callback):
    """Keeps the weights after some updates."""

    every = 1

    def __init__(self):
        self.after = {}

    def on_step(self, info):
        if info.step in UPDATES:
            self.after[info.step] = {n: np.array(x) for n, x in flatten(info.read_state().params).items()}


@pytest.fixture
def compared(monkeypatch, capsys):
    """``compared(name, seeds, **fields)``: for each seed, the largest difference of a weight between the member and the
    single run by update, and the differences of their actions by row."""
    together, fit = [], many._fit

    def watched(runs, *arguments):
        together.extend(runs)
        return fit(runs, *arguments)

    monkeypatch.setattr(many, "_fit", watched)

    def compare(name, seeds, **fields):
        fixed = {"batch_size": 16, "total_steps": UPDATES[-1], **fields}
        recommended = recipe(name, make_env(SPEC), fixed)
        # train_ratio=0 is one update per decision step.
        config = TrainingConfig(**recommended.training).replace(**fixed, train_ratio=0.0, device="cpu", loop="device")
        members, found = [Weights() for _ in seeds], []
        train_many(name, SPEC, seeds, config=config, callbacks=lambda index: [members[index]])
        for seed, member, run in zip(seeds, members, together, strict=True):
            alone = Weights()
            model = create_world_model(name, **recommended.model, seed=seed, device="cpu")
            trainer = Trainer(model, config.replace(seed=seed), callbacks=[alone])
            trainer.train(make_env(SPEC, seed=seed))
            apart = {
                update: max(float(np.abs(x - member.after[update][n]).max()) for n, x in weights.items())
                for update, weights in alone.after.items()
            }
            one, other = (replay.take(np.arange(len(replay))) for replay in (run.collector.replay, trainer.replay))
            assert len(one["actions"]) == len(other["actions"])
            found.append((apart, np.abs(one["actions"] - other["actions"]).max(-1)))
        with capsys.disabled():
            for seed, (apart, actions) in zip(seeds, found, strict=True):
                weights = ", ".join(f"{value:.1e} after {update}" for update, value in apart.items())
                print(f"\n{name}, seed {seed}: {weights}; actions {actions.max():.1e}", end="")
        return found

    return compare


def test_on_the_same_rows_a_hundred_updates_leave_members_where_the_first_ones_did(compared):
    found = compared("tdmpc2:tiny", SEEDS, prefill=150, prefill_updates=100)
    for apart, actions in found:
        assert apart.keys() == set(UPDATES)
        assert not actions.any()
        assert max(apart.values()) <= 1e-5
