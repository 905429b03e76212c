"""Is a damaged checkpoint ever loaded as a good one? Prints JSON; ``python benchmarks/damage.py --checkpoints 200``.

In each trial, some files of a run's checkpoints and of the replay they refer to are damaged at random: a byte is
changed, or the file is truncated, extended, emptied, deleted, or replaced by another checkpoint's. Then the run is
resumed. It must continue from the newest checkpoint whose files are all intact, with exactly its state, or report
that none is left; otherwise the exit code is 1.
"""

import argparse
import collections
import json
import logging
import os
import platform
import random
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

from worldloom.errors import CheckpointError
from worldloom.replay import ReplayStore
from worldloom.training.checkpoint import Checkpointer
from worldloom.training.checkpoint_files import flatten_state


def spoil(path, rng, twins):
    """Damage one file and return the kind of damage. ``twins`` are files of the same name in other checkpoints."""
    data = path.read_bytes()
    how = rng.choice(["byte", "cut", "longer", "empty", "deleted", "exchanged"])
    place = rng.randrange(len(data)) if data else 0
    if how == "byte" and data:
        path.write_bytes(data[:place] + bytes([data[place] ^ rng.randrange(1, 256)]) + data[place + 1 :])
    elif how == "cut" and data:
        path.write_bytes(data[:place])
    elif how == "longer":
        path.write_bytes(data + rng.randbytes(rng.randrange(1, 100)))
    elif how == "exchanged" and twins:
        path.write_bytes(rng.choice(twins).read_bytes())
    elif how == "empty" and data:
        path.write_bytes(b"")
    else:
        path.unlink()
        return "deleted"
    return how


def content(snapshot):
    """The whole state of a checkpoint as one comparable value."""
    arrays = {**flatten_state(snapshot.state), **{f"around/{k}": v for k, v in snapshot.arrays.items()}}
    if snapshot.replay is not None and len(snapshot.replay):
        ids = np.arange(*snapshot.replay.state_dict().values())
        batch = snapshot.replay.take(ids[:, None], latents=bool(snapshot.replay.latents))
        arrays |= {f"replay/{k}": v for k, v in batch.items() if not isinstance(v, dict)}
        arrays |= {f"replay/{k}/{n}": w for k, v in batch.items() if isinstance(v, dict) for n, w in v.items()}
    arrays = {name: (np.asarray(a).dtype.str, np.shape(a), np.asarray(a).tobytes()) for name, a in arrays.items()}
    return arrays, snapshot.record


def parts(folder, step):
    """The files that a checkpoint needs, relative to ``folder``."""
    record = json.loads((folder / str(step) / "run.json").read_text())
    own = [path for path in (folder / str(step)).rglob("*") if path.is_file()]
    replay = [folder / "replay" / name for name in ReplayStore.names(record["replay"])] if record.get("replay") else []
    return {path.relative_to(folder) for path in own + replay}


def examine(name, count, rng, steps=40):
    """Damage the checkpoints of one small run ``count`` times and count the outcomes."""
    from runs import small_run

    outcomes, damage, wrong = collections.Counter(), collections.Counter(), []
    with tempfile.TemporaryDirectory() as temporary:
        trainer, source = small_run(name, Path(temporary), steps=steps, save_every=10, keep_last=10)
        trainer.train(source)
        intact, folder = Path(temporary) / "checkpoints", Path(temporary) / "damaged"
        identity = trainer.run.identity()
        needed = {step: parts(intact, step) for step in Checkpointer(intact).steps()}
        good = {step: content(Checkpointer(intact).restore(trainer.state, identity, step)) for step in needed}
        files = sorted(set().union(*needed.values()))
        for number in range(count):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(intact, folder)
            hit = set()
            # The newest checkpoint is always damaged, and in every other trial further ones.
            newest = sorted(needed[max(needed)])
            for file in [rng.choice(newest), *rng.sample(files, rng.choice([0, 0, 1, 3, 8]))]:
                if file in hit:
                    continue
                twins = [folder / str(step) / Path(*file.parts[1:]) for step in needed]
                twins = [twin for twin in twins if twin.is_file() and twin != folder / file]
                damage[spoil(folder / file, rng, twins)] += 1
                if not same(folder / file, intact / file):
                    hit.add(file)
            left = [step for step in needed if not needed[step] & hit]
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    found = Checkpointer(folder).restore(trainer.state, identity)
                except CheckpointError as error:
                    outcome, right = "said that none is left", not left and str(folder) in str(error)
                else:
                    step = found.step
                    outcome = "newest: nothing that counts was hit" if step == max(needed) else "went back, and said so"
                    told = step == max(needed) or any("Going back" in str(warning.message) for warning in said)
                    right = bool(left) and step == max(left) and content(found) == good[step] and told
            outcomes[outcome] += 1
            if not right:
                wrong.append({"number": number, "outcome": outcome, "hit": sorted(map(str, hit)), "left": left})
    return {"checkpoints": count, "outcomes": dict(outcomes), "damage": dict(damage), "wrong": wrong}


def same(path, other):
    return path.exists() and path.read_bytes() == other.read_bytes()


def main():
    from runs import RUNS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=200, help="total number, shared between the runs")
    parser.add_argument("--runs", default=",".join(RUNS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.ERROR)
    sys.unraisablehook = lambda _: None
    names, rng, report = options.runs.split(","), random.Random(options.seed), {}
    for number, name in enumerate(names):
        count = options.checkpoints * (number + 1) // len(names) - options.checkpoints * number // len(names)
        report[name] = examine(name, count, rng)
    wrong = sum(len(entry["wrong"]) for entry in report.values())
    report |= {"checkpoints": options.checkpoints, "wrong": wrong}
    print(json.dumps(report | {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}, indent=1))
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
