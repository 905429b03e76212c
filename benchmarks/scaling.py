"""How does the time of an update or a plan grow with the work?

    python benchmarks/scaling.py --plot scaling.png > scaling.json
    python benchmarks/scaling.py --only tdmpc2/plan/num_samples tdmpc2/plan/environments
    python benchmarks/scaling.py --saved scaling.json --plot scaling.png

Each sweep increases one size and keeps the others at the reference setting, which is the first value of every sweep.
Prints JSON: ``work`` is a size relative to the first one, ``times`` its time relative to the first one's in the same
round (median over rounds, timed alternately; ``least`` and ``most`` are the extremes), ``exponent`` is p in time =
workᵖ at the last size, and ``superlinear`` says whether any time exceeds 1.1 times its work. Work that does not
depend on the size makes exponents small. ``--plot`` plots the results; ``--saved`` plots those printed before.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
from pathlib import Path

import jax
from work import kept_or_returned, measure, plan_call, update_call

import worldloom
from worldloom.report.figure import COLOURS, GREY, new_figure, save_figure

# Family, work and size: values, and those with --small.
SWEEPS = {
    "dreamer/update/batch_size": ((16, 32, 64), (4, 8)),
    "dreamer/update/length": ((64, 128, 256), (8, 16)),
    "dreamer/update/imagination_horizon": ((15, 30, 60), (3, 6)),
    "tdmpc2/update/batch_size": ((256, 512, 1024), (32, 64)),
    "tdmpc2/update/horizon": ((3, 6, 12), (2, 4)),
    "tdmpc2/update/num_q": ((5, 10, 20), (2, 4)),
    "tdmpc2/plan/num_samples": ((512, 1024, 2048), (64, 128)),
    "tdmpc2/plan/environments": ((1, 4, 16), (1, 4)),
}


def sweep(name, model, *, rounds, small):
    """Times of all values of one sweep. Its memory is freed on return, except compiled programs."""
    work, _, field = name.rpartition("/")
    sizes = {other.rpartition("/")[2]: SWEEPS[other][small][0] for other in SWEEPS if other.startswith(f"{work}/")}
    sizes |= {"obs_shape": (24,), "action_dim": 6}
    if work == "tdmpc2/update":
        sizes["length"] = 1  # its sequences have at least horizon + 1 rows anyway
    values = SWEEPS[name][small]
    make = plan_call if work.endswith("plan") else update_call
    calls = [make(model, **{**sizes, field: value})[0] for value in values]
    seconds = [[measure(call, repeats=3)["median_seconds"] for call in calls] for _ in range(rounds)]
    ratios = list(zip(*([one / turn[0] for one in turn] for turn in seconds), strict=True))
    growth = [value / values[0] for value in values]
    times = list(map(statistics.median, ratios))
    return {
        "values": values,
        "seconds": list(map(statistics.median, zip(*seconds, strict=True))),
        "work": growth,
        "times": times,
        "least": list(map(min, ratios)),
        "most": list(map(max, ratios)),
        "exponent": math.log(times[-1]) / math.log(growth[-1]),
        "superlinear": any(time > 1.1 * size for time, size in zip(times, growth, strict=True)),
    }


def plot(report, path):
    """One panel per family: time against size, both relative to the first, with error bars from least to most."""
    families = list(dict.fromkeys(name.partition("/")[0] for name in report["sweeps"]))
    figure, axes = new_figure(1, len(families), width=5.2 * len(families), height=4.6)
    for axis, family in zip(axes.flat, families, strict=True):
        found = {name: one for name, one in report["sweeps"].items() if name.startswith(f"{family}/")}
        most = max(one["work"][-1] for one in found.values())
        axis.plot([1, most], [1, most], color=GREY, linestyle="--", linewidth=1.2, label="in proportion")
        for index, (name, one) in enumerate(found.items()):
            _, work, field = name.split("/")
            ends = f"{one['values'][0]}–{one['values'][-1]}"
            label = f"{work}, {field.replace('_', ' ')} {ends} (exponent {one['exponent']:.2f})"
            down = [time - low for time, low in zip(one["times"], one["least"], strict=True)]
            up = [high - time for time, high in zip(one["times"], one["most"], strict=True)]
            axis.errorbar(
                one["work"], one["times"], [down, up], label=label, color=COLOURS[index], marker="osD^v<"[index],
                markersize=4.5, linewidth=1.6, elinewidth=0.9, capsize=2, linestyle=":" if work == "plan" else "-",
            )  # fmt: skip
        for scale, ruler in ((axis.set_xscale, axis.xaxis), (axis.set_yscale, axis.yaxis)):
            scale("log", base=2)
            ruler.set_major_formatter("{x:g}×")
        axis.set_xlabel("size, over the first", fontsize=9)
        axis.set_ylabel("time, over the first", fontsize=9)
        axis.set_title(report[family], fontsize=10, loc="left")
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dreamer", help="default: dreamerv3:size1m, or dreamerv3:tiny with --small")
    parser.add_argument("--tdmpc2", help="default: tdmpc2:5m, or tdmpc2:tiny with --small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only", nargs="+", choices=SWEEPS, default=list(SWEEPS), metavar="SWEEP", help=", ".join(SWEEPS)
    )
    parser.add_argument("--small", action="store_true", help="tiny presets and sizes, as a smoke test")
    parser.add_argument("--plot", metavar="FILE.png")
    parser.add_argument("--saved", metavar="FILE.json", help="plot this file instead of measuring")
    kept_or_returned(parser)
    args = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", args.small)  # a small run spends all its time compiling
    if args.saved:
        if not args.plot:
            parser.error("--saved goes with --plot")
        return plot(json.loads(Path(args.saved).read_text()), args.plot)
    report = {
        "question": "time of an update or a plan against its size, both over the first",
        "dreamer": args.dreamer or ("dreamerv3:tiny" if args.small else "dreamerv3:size1m"),
        "tdmpc2": args.tdmpc2 or ("tdmpc2:tiny" if args.small else "tdmpc2:5m"),
        "sweeps": {},
        "rounds": args.rounds,
        "small": args.small,
        "returned": args.returned,
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "versions": {"worldloom": worldloom.__version__, "jax": jax.__version__, "python": platform.python_version()},
    }
    for name in args.only:
        model = report[name.partition("/")[0]]
        report["sweeps"][name] = sweep(name, model, rounds=args.rounds, small=args.small)
        print(json.dumps({name: report["sweeps"][name]}), flush=True, file=sys.stderr)
    print(json.dumps(report, indent=2))
    if args.plot:
        plot(report, args.plot)


if __name__ == "__main__":
    main()
