"""How long does a plan take, and what does batching environments save?

    python benchmarks/plan.py --model tdmpc2:5m

Prints JSON. ``batching`` is the time of 16 calls for one environment divided by that of one call for 16, timed
alternately.
"""

import argparse
import json
import statistics

from work import kept_or_returned, measure, plan_call, report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tdmpc2:5m")
    parser.add_argument("--environments", type=int, default=16)
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--repeats", type=int, default=15)
    kept_or_returned(parser)
    args = parser.parse_args()
    sizes = {"obs_shape": (24,), "action_dim": 6, "precision": args.precision}
    one, model, trace = plan_call(args.model, **sizes)
    many, _, _ = plan_call(args.model, **sizes, environments=args.environments)
    timing = measure(one, repeats=args.repeats)
    many()
    ratios = []
    for _ in range(5):
        apart = args.environments * measure(one, repeats=3)["median_seconds"]
        ratios.append(apart / measure(many, repeats=1)["median_seconds"])
    about = {"batching": statistics.median(ratios), **vars(args)}
    print(json.dumps(report("seconds per plan for one environment", timing, model, trace, **about), indent=2))


if __name__ == "__main__":
    main()
