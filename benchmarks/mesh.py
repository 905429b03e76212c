"""What does dividing an update over the devices of a mesh cost?

    python benchmarks/mesh.py --model tdmpc2:1m --batch-size 256 --length 4
    python benchmarks/mesh.py --model dreamerv3:tiny --mesh data=2,fsdp=2

The same update of the same batch on one device and on a mesh of virtual devices, which share this machine's cores: a
ratio of 1 is free. Prints JSON: wall-clock and CPU seconds of each, timed alternately, their ratios in pairs (median,
least and most), FLOPs of each device relative to those of one, and the bytes of what the compiled program moves.
"""

import argparse
import json
import os
import statistics
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="tdmpc2:1m")
parser.add_argument("--mesh", default="data=2", help="as in worldloom train --mesh")
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--length", type=int, default=16, help="rows per sequence for backpropagation")
parser.add_argument("--microbatches", type=int, default=1)
parser.add_argument("--pairs", type=int, default=9)
parser.add_argument("--updates", type=int, default=3, help="updates per timing")
args = parser.parse_args()
mesh = {name: int(size) for name, size in (part.split("=") for part in args.mesh.split(","))}
devices = 1
for size in mesh.values():
    devices *= size
# Before JAX is imported.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()

import jax
from work import random_batch

from worldloom import create_world_model
from worldloom.cli.mesh_report import collective_bytes
from worldloom.sharding import Placement
from worldloom.training import TrainingConfig
from worldloom.training.update_loop import CompiledUpdate, Learner, NonFiniteGuard


def prepare(model, sizes):
    """A function that does one update, and its compiled program."""
    training = TrainingConfig(
        batch_size=args.batch_size,
        sequence_length=args.length,
        microbatches=args.microbatches,
        mesh=sizes,
        device="cpu",
    )
    placement, algorithm = Placement.of(sizes, jax.devices()[0]), model.algorithm
    settings, spec = training.of_update(), algorithm.replay_spec(model.config, training)
    update = algorithm.make_update(model.config, settings, model_class=type(model))
    call = CompiledUpdate(update, algorithm.loss_terms, False, bool(spec.latents), True, placement)
    batch = random_batch(model.config.obs_shape, model.config.action_dim, args.batch_size, spec.rows)
    if spec.latents:
        shapes = {
            name: jax.ShapeDtypeStruct((args.batch_size, *shape), "float32") for name, shape in spec.latents.items()
        }
        batch["context"] = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), shapes)
    batches = placement.put_batches(jax.tree.map(lambda x: x[None], batch), args.batch_size)
    state = placement.put_state(algorithm.init_state(model, settings, jax.random.key(0)))
    now = {"learner": Learner(state, placement.put_state(NonFiniteGuard.create()))}
    program = call.lower(now["learner"], batches).compile()

    def step():
        now["learner"], output = call(now["learner"], batches, 1)
        jax.block_until_ready((now["learner"], output))

    return step, program


def seconds(step):
    """Wall-clock and CPU seconds of one update."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(args.updates):
        step()
    return (time.perf_counter() - wall) / args.updates, (time.process_time() - cpu) / args.updates


def main():
    """Print the comparison."""
    model = create_world_model(args.model, obs_shape=(24,), action_dim=6, device="cpu")
    (one, alone), (many, divided) = prepare(model, {}), prepare(model, mesh)
    one(), many()
    pairs = [(seconds(one), seconds(many)) for _ in range(args.pairs)]
    result = vars(args) | {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
    for kind, name in enumerate(("wall", "cpu")):
        ratios = [b[kind] / a[kind] for a, b in pairs]
        result[f"{name}_seconds"] = [
            statistics.median(each[kind] for each in side) for side in zip(*pairs, strict=True)
        ]
        result[f"{name}_ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
    result["flops_of_each_device"] = divided.cost_analysis()["flops"] / alone.cost_analysis()["flops"]
    result["bytes"] = collective_bytes(divided.as_text())
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
