"""What ``worldloom doctor RUN`` says of a run: the rewards that it has met."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from worldloom.report.score import read_episodes
from worldloom.training.callbacks.episodes import EPISODES_FILE
from worldloom.training.checkpoint import Checkpointer
from worldloom.training.checkpoint_files import read_summary
from worldloom.training.rewards_seen import RewardsSeen
from worldloom.training.run_folder import RunFolder


def rewards_seen(run: RunFolder) -> Iterator[str]:
    """Lines about the rewards and returns of a run: of its prefill, and since.

    Raises ``FileFormatError`` if ``run`` is not the folder of a run.
    """
    yield run.title()
    # Rewards of single steps, from the newest checkpoint that can be read.
    seen = RewardsSeen()
    for step in reversed(Checkpointer(run.checkpoints).steps()):
        if summary := read_summary(run.checkpoints / str(step)):
            seen = RewardsSeen(**(summary.get("collector") or {}).get("seen", {}))
            break
        yield f"  checkpoint {step} cannot be read"
    if run.settings().get("env") is None:
        yield "  trained from recorded episodes, it has met no rewards in environments"
    elif seen.low is None:
        yield "  no checkpoint of a run in environments says yet which rewards it has met"
    else:
        range_ = f"{_number(seen.low)} to {_number(seen.high)}, mean {_number(seen.mean)}"
        yield f"  rewards of a step: {range_} in the prefill, at most {_number(seen.since)} since"
    # Returns of episodes.
    lines = read_episodes(run.path / EPISODES_FILE)
    for when, returns in (
        ("in the prefill", [line["return"] for line in lines if line.get("prefill")]),
        ("since", [line["return"] for line in lines if not line.get("prefill")]),
    ):
        if returns:
            newest = "" if when != "since" else f"; mean of the last {len(returns[-20:])}: {fmean(returns[-20:]):.6g}"
            yield f"  returns of {len(returns):,} episodes {when}: best {max(returns):.6g}{newest}"
    if seen.low is not None:
        text = None if run.training_config().offline_updates else seen.nothing_new()
        yield f"  {text or 'nothing conspicuous'}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
