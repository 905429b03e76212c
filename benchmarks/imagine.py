"""How fast is imagination?

    python benchmarks/imagine.py --model dreamerv3:size1m
    python benchmarks/imagine.py --model tdmpc2:5m --batch-size 512 --horizon 3

Times ``model.imagine`` with given actions: B states, H steps, including rewards and continues. Prints JSON.
"""

import argparse
import json

from work import imagine_call, kept_or_returned, measure, report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dreamerv3:size1m")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--horizon", type=int, default=15)
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--repeats", type=int, default=15)
    kept_or_returned(parser)
    args = parser.parse_args()
    call, model, trace = imagine_call(
        args.model,
        obs_shape=(24,),
        action_dim=6,
        batch_size=args.batch_size,
        horizon=args.horizon,
        precision=args.precision,
    )
    timing = measure(call, repeats=args.repeats)
    about = {"states_per_second": args.batch_size * args.horizon / timing["median_seconds"], **vars(args)}
    print(json.dumps(report("seconds per imagined trajectory batch", timing, model, trace, **about), indent=2))


if __name__ == "__main__":
    main()
