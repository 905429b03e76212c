"""A policy that learns in imagination only: REINFORCE in JAX inside of a world model of CartPole-v1.

Trains a small DreamerV3 on episodes of random actions, then a small policy in the environments that the model
imagines, all in one compiled program, and plays the real CartPole with it. The policy sees what the model decodes, in
the units of the real observations, so the model is no longer needed to play.

    python examples/reinforce_in_imagination.py [--seed 0] [--episodes 400]

FAST=1 shrinks everything until nothing is learned.
"""

import argparse
import os

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax

from worldloom import create_world_model
from worldloom.envs import ImaginedWorld
from worldloom.training import ReplayBuffer, Trainer, TrainingConfig

FAST = os.environ.get("FAST") == "1"
ENVS, HORIZON = (8, 5) if FAST else (128, 50)
# What a cart at rest could reach: scaled, all four numbers weigh about the same in the model's loss.
UNITS = np.float32([0.6, 0.8, 0.12, 0.8])


# --- The world model: random episodes in, imagined episodes out. --------------------------------------------------


def random_episodes(count, seed):
    env, rng, replay = gym.make("CartPole-v1"), np.random.default_rng(seed), ReplayBuffer(100_000, action_dim=2)
    returns = []
    for episode in range(count):
        observations, actions, over = [env.reset(seed=seed * 100_000 + episode)[0]], [], False
        while not over:
            actions.append(int(rng.integers(2)))
            obs, _, terminated, truncated, _ = env.step(actions[-1])
            observations.append(obs)
            over = terminated or truncated
        returns.append(len(actions))
        rewards = np.ones(len(actions), np.float32)
        replay.add_episode(np.float32(observations) / UNITS, np.array(actions), rewards, terminated=terminated)
    return replay, returns


def train_model(replay, updates, seed):
    # Only the world model matters here: more weight on it, and short imagination for its own actor and critic.
    model = create_world_model(
        "dreamerv3:tiny", obs_shape=(4,), action_dim=2, action_type="discrete", seed=seed,
        reconstruction_scale=30.0, kl_free=0.1, kl_scale=0.3, imagination_horizon=2, imagination_starts=2,
    )  # fmt: skip
    config = TrainingConfig(
        total_steps=updates, learning_rate=2e-3, warmup_steps=50, grad_clip=0.0, sequence_length=16, seed=seed,
        device="auto",
    )  # fmt: skip
    Trainer(model, config, []).train(replay)
    return model


# --- The policy: two layers, REINFORCE on imagined returns. --------------------------------------------------------


def init_policy(key, hidden=32):
    return {"in": 0.5 * jax.random.normal(key, (4, hidden)), "bias": jnp.zeros(hidden), "out": jnp.zeros((hidden, 2))}


def logits(policy, obs):
    """Observations [..., 4] in UNITS → logits [..., 2]."""
    return jnp.tanh(obs @ policy["in"] + policy["bias"]) @ policy["out"]


def make_update(world, optimizer):
    """``update(params, policy, opt_state, key)``: imagine ENVS episodes with the policy and improve it by them."""
    reset, step = jax.vmap(world.reset, (None, 0)), jax.vmap(world.step, (None, 0, 0))

    def imagine(params, policy, key):
        """Observations and actions [H, N, ...], rewards [H, N], and whether the episode was still running [H, N]."""
        reset_key, *keys = jax.random.split(key, HORIZON + 1)
        state, obs = reset(params, jax.random.split(reset_key, ENVS))

        def one(carry, key):
            state, obs, running = carry
            actions = jax.random.categorical(key, logits(policy, obs))
            state, out = step(params, state, actions)
            return (state, out.obs, running & ~out.terminated), (obs, actions, out.reward * running, running)

        _, rollout = jax.lax.scan(one, (state, obs, jnp.ones(ENVS, bool)), jnp.stack(keys))
        return rollout

    @jax.jit
    def update(params, policy, opt_state, key):
        obs, actions, rewards, running = imagine(params, policy, key)
        # Reward to go, against the mean of the environments that are running at the same step.
        returns = jnp.cumsum(rewards[::-1], 0)[::-1]
        count = jnp.maximum(running.sum(1, keepdims=True), 1)
        baseline = (returns * running).sum(1, keepdims=True) / count
        advantages = (returns - baseline) * running / (returns.std() + 1e-6)

        def loss(policy):
            log_probs = jax.nn.log_softmax(logits(policy, obs))
            chosen = jnp.take_along_axis(log_probs, actions[..., None], -1)[..., 0]
            return -(advantages * chosen).sum() / running.sum()

        grads = jax.grad(loss)(policy)
        steps, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(policy, steps), opt_state, returns[0].mean()

    return update


def train_policy(world, updates, seed):
    policy = init_policy(jax.random.key(seed))
    optimizer = optax.adam(1e-2)
    opt_state, params = optimizer.init(policy), world.params
    update = make_update(world, optimizer)
    for number in range(updates):
        key = jax.random.fold_in(jax.random.key(seed + 1), number)
        policy, opt_state, imagined = update(params, policy, opt_state, key)
        if (number + 1) % max(updates // 5, 1) == 0:
            print(f"  update {number + 1:4}: imagined return {float(imagined):6.1f} of at most {HORIZON}")
    return policy


# --- The real environment. -----------------------------------------------------------------------------------------


def play(policy, episodes, seed):
    env, act = gym.make("CartPole-v1"), jax.jit(lambda obs: jnp.argmax(logits(policy, obs)))
    returns = []
    for episode in range(episodes):
        obs, over, total = env.reset(seed=1_000_000 + seed * 1000 + episode)[0], False, 0.0
        while not over:
            obs, reward, terminated, truncated, _ = env.step(int(act(obs / UNITS)))
            total, over = total + reward, terminated or truncated
        returns.append(total)
    return returns


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=20 if FAST else 400, help="random episodes to learn from")
    parser.add_argument("--updates", type=int, default=5 if FAST else 1000, help="updates of the world model")
    parser.add_argument("--policy-updates", type=int, default=3 if FAST else 300)
    args = parser.parse_args()

    replay, random_returns = random_episodes(args.episodes, args.seed)
    print(f"seed {args.seed}: {args.episodes} random episodes, {len(replay)} rows")
    model = train_model(replay, args.updates, args.seed)
    world = ImaginedWorld(model, replay, horizon=HORIZON, context=4, num_starts=1024, seed=args.seed)
    policy = train_policy(world, args.policy_updates, args.seed)
    returns = play(policy, 2 if FAST else 20, args.seed)
    print(
        f"seed {args.seed}: real return {np.mean(returns):.1f} ± {np.std(returns):.1f} after learning in imagination, "
        f"{np.mean(random_returns):.1f} ± {np.std(random_returns):.1f} with random actions"
    )


if __name__ == "__main__":
    main()
