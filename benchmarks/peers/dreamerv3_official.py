"""Time a full update of danijar/dreamerv3 from a checkout of it, with the Python that runs this script (JAX 0.4.33).

    python benchmarks/peers/dreamerv3_official.py --checkout DIR --size size1m --obs vector

The update is the reference's own ``train``: loss, gradients, optimizer, slow critic, write-back entries, jitted with
donated weights. Serves the protocol of ``_serve``; run it through ``compare.py``.
"""

import argparse
import sys
from pathlib import Path

from _serve import serve


def make_agent(args):
    import elements
    import embodied.jax.nets as nets
    import jax.numpy as jnp
    import numpy as np
    import ruamel.yaml
    from dreamerv3.agent import Agent

    nets.COMPUTE_DTYPE = getattr(jnp, args.precision)
    text = (args.checkout / "dreamerv3" / "configs.yaml").read_text(encoding="utf-8")
    configs = ruamel.yaml.YAML(typ="safe").load(text)
    config = elements.Config(configs["defaults"]).update(configs[args.size])
    space = elements.Space
    obs_space = {
        "image": {"image": space(np.uint8, (64, 64, 3))},
        "vector": {"vector": space(np.float32, (args.obs_dim,))},
    }[args.obs]
    obs_space |= {"reward": space(np.float32), **{k: space(bool) for k in ("is_first", "is_last", "is_terminal")}}
    act_space = {"action": space(np.float32, (args.action_dim,), -1, 1)}
    agent = object.__new__(Agent)  # without its wrapper, which needs a whole training set-up
    agent.__init__(
        obs_space,
        act_space,
        elements.Config(
            **config.agent, logdir="", seed=0, jax=config.jax, batch_size=args.batch_size,
            batch_length=args.length, replay_context=config.replay_context, report_length=config.report_length,
            replica=0, replicas=1,
        ),
    )  # fmt: skip
    return agent


def make_data(agent, args):
    import numpy as np

    rng = np.random.default_rng(0)
    shape = (args.batch_size, args.length + 1)  # one row of replay context
    data = {
        "reward": rng.normal(size=shape).astype(np.float32),
        "is_first": np.zeros(shape, bool),
        "is_last": np.zeros(shape, bool),
        "is_terminal": np.zeros(shape, bool),
        "action": rng.uniform(-1, 1, (*shape, args.action_dim)).astype(np.float32),
        "stepid": np.zeros((*shape, 20), np.uint8),
        "consec": np.zeros(shape, np.int32),
    }
    if args.obs == "image":
        data["image"] = rng.integers(0, 256, (*shape, 64, 64, 3), np.uint8)
    else:
        data["vector"] = rng.normal(size=(*shape, args.obs_dim)).astype(np.float32)
    data |= {
        key: np.zeros((*shape, *space.shape), space.dtype) for key, space in agent.ext_space.items() if key not in data
    }
    return data


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--size", default="size1m")
    parser.add_argument("--obs", choices=["vector", "image"], default="vector")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--obs-dim", type=int, default=24)
    parser.add_argument("--action-dim", type=int, default=6)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    sys.path.insert(0, str(args.checkout))

    import jax
    import ninjax as nj
    import numpy as np

    agent = make_agent(args)
    data = jax.device_put(make_data(agent, args))
    seed = np.array([0, 1], np.uint32)

    carry = nj.pure(agent.init_train)({}, args.batch_size, seed=seed)[1]
    params = jax.jit(nj.init(agent.train))({}, carry, data, seed=seed)
    train = nj.pure(agent.train)
    step = jax.jit(lambda params, *inputs: train(params, *inputs, seed=seed), donate_argnums=0)
    state = {"params": params}

    def update():
        state["params"], (_, _, metrics) = step(state["params"], carry, data)
        jax.block_until_ready((state["params"], metrics))

    serve(
        update, program="danijar/dreamerv3", jax=jax.__version__, device=jax.devices()[0].device_kind,
        size=args.size, obs=args.obs, batch=[args.batch_size, args.length], precision=args.precision,
    )  # fmt: skip


if __name__ == "__main__":
    main()
