"""How long does one full update take?

    python benchmarks/update.py --model dreamerv3:size1m
    python benchmarks/update.py --model tdmpc2:5m --batch-size 256 --length 4

Prints JSON. Floating-point operations are counted by XLA, which counts the body of a scan once: for DreamerV3 the
fraction of the ceiling is therefore a lower bound.
"""

import argparse
import json

from work import kept_or_returned, measure, report, update_call


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dreamerv3:size1m")
    parser.add_argument("--obs", choices=["vector", "image"], default="vector")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="rows per sequence for backpropagation")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--repeats", type=int, default=15)
    kept_or_returned(parser)
    args = parser.parse_args()
    image = (9, 64, 64) if args.model.startswith("tdmpc2") else (64, 64, 3)
    call, model, trace = update_call(
        args.model,
        obs_shape=(24,) if args.obs == "vector" else image,
        action_dim=6,
        batch_size=args.batch_size,
        length=args.length,
        precision=args.precision,
    )
    timing = measure(call, repeats=args.repeats)
    print(json.dumps(report("seconds per update", timing, model, trace, **vars(args)), indent=2))


if __name__ == "__main__":
    main()
