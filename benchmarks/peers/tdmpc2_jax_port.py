"""Time an update or a plan of ShaneFlandermeyer/tdmpc2-jax from a checkout of it.

Runs with the Python that can run the port.

    python benchmarks/peers/tdmpc2_jax_port.py --checkout DIR --work update

That Python needs jax, flax, optax, einops, jaxtyping and omegaconf. The agent is the one of the port's own
``config.yaml``. Serves the protocol of ``_serve``; run it through ``compare.py``.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from _serve import serve


def make_agent(args):
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax
    from flax.training.train_state import TrainState
    from omegaconf import OmegaConf
    from tdmpc2_jax import TDMPC2, WorldModel
    from tdmpc2_jax.common.activations import mish, simnorm
    from tdmpc2_jax.networks import NormedLinear

    config = OmegaConf.load(args.checkout / "tdmpc2_jax" / "config.yaml")
    world, coder = config.world_model, config.encoder
    keys = jax.random.split(jax.random.key(0))
    layer = partial(NormedLinear, dtype=world.dtype)
    hidden = [layer(coder.encoder_dim, activation=mish) for _ in range(1, coder.num_encoder_layers)]
    latent = layer(world.latent_dim, activation=partial(simnorm, simplex_dim=world.simnorm_dim))
    network = nn.Sequential([*hidden, latent])
    steps = optax.zero_nans(), optax.clip_by_global_norm(world.max_grad_norm), optax.adam(coder.learning_rate)
    encoder = TrainState.create(
        apply_fn=network.apply,
        params=network.init(keys[0], jnp.zeros((1, args.obs_dim)))["params"],
        tx=optax.chain(*steps),
    )
    model = WorldModel.create(action_dim=args.action_dim, encoder=encoder, key=keys[1], **world)
    return TDMPC2.create(world_model=model, **{**config.tdmpc2, "batch_size": args.batch_size})


def count_parameters(model):
    """Trained parameters: all but the slow copy of the critics."""
    import jax

    trained = model.encoder, model.dynamics_model, model.reward_model, model.policy_model, model.value_model
    return sum(x.size for part in trained for x in jax.tree.leaves(part.params))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--work", choices=["update", "plan"], default="update")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--obs-dim", type=int, default=24)
    parser.add_argument("--action-dim", type=int, default=6)
    args = parser.parse_args()
    sys.path.insert(0, str(args.checkout))

    import jax
    import numpy as np

    agent = make_agent(args)
    model, rows = agent.model, (agent.horizon, args.batch_size)
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(agent.horizon + 1, args.batch_size, args.obs_dim)).astype(np.float32)
    batch = jax.device_put(
        {
            "observations": obs[:-1],
            "actions": rng.uniform(-1, 1, (*rows, args.action_dim)).astype(np.float32),
            "rewards": rng.uniform(size=rows).astype(np.float32),
            "next_observations": obs[1:],
            "terminated": np.zeros(rows, bool),
            "truncated": np.zeros(rows, bool),
        }
    )
    key = jax.random.key(1)
    state = {"agent": agent, "plan": None}

    def update():
        state["agent"], metrics = state["agent"].update(**batch, key=key)
        jax.block_until_ready((state["agent"], metrics))

    def plan():
        _, state["plan"] = agent.act(obs[0, :1], state["plan"], train=True, key=key)
        jax.block_until_ready(state["plan"])

    serve(
        {"update": update, "plan": plan}[args.work],
        program="ShaneFlandermeyer/tdmpc2-jax", jax=jax.__version__, device=jax.devices()[0].device_kind,
        parameters=count_parameters(model), work=args.work, batch=[args.batch_size, agent.horizon + 1],
        latent=model.latent_dim, critics=model.num_value_nets, bins=model.num_bins, samples=agent.population_size,
        policy_samples=agent.policy_prior_samples, elites=agent.num_elites, iterations=agent.mppi_iterations,
    )  # fmt: skip


if __name__ == "__main__":
    main()
