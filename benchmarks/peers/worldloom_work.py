"""Serve the protocol of ``_serve`` for our side of a comparison."""

import argparse
import sys
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

from _serve import serve  # isort: skip  (sets up memory)
import jax
from work import plan_call, update_call

from worldloom import __version__


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="for example tdmpc2:5m or dreamerv3:size1m")
    parser.add_argument("--work", choices=["update", "plan"], default="update")
    parser.add_argument("--obs", choices=["vector", "image"], default="vector")
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--length", type=int, required=True, help="rows per sequence for backpropagation")
    parser.add_argument("--precision", default="float32")
    args = parser.parse_args()
    shapes = {"obs_shape": (24,) if args.obs == "vector" else (64, 64, 3), "action_dim": 6}
    if args.work == "plan":
        call, model, _ = plan_call(args.model, **shapes, precision=args.precision)
    else:
        call, model, _ = update_call(
            args.model, **shapes, batch_size=args.batch_size, length=args.length, precision=args.precision
        )
    serve(
        call, program="worldloom", version=__version__, jax=jax.__version__, device=jax.devices()[0].device_kind,
        parameters=model.num_parameters(), work=args.work,
    )  # fmt: skip


if __name__ == "__main__":
    main()
