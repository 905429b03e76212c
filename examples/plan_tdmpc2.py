"""How TD-MPC2 plans: it imagines hundreds of futures and fits a plan to the best ones. The planner step by step.

python examples/plan_tdmpc2.py                       # trains a model first
python examples/plan_tdmpc2.py runs/my-run/model     # uses your model of --env
"""

import argparse
import os

import jax
import numpy as np

from worldloom import create_world_model
from worldloom.envs import make_env
from worldloom.models.tdmpc2 import planner
from worldloom.training import Trainer, TrainingConfig, play, recipe

FAST = os.environ.get("FAST") == "1"


def learn(env):
    """Train a model for 3,000 environment steps: not good yet, but good enough to plan with."""
    model_fields, training_fields, _ = recipe("tdmpc2:tiny", env)
    training_fields |= {"env_steps": 3_000}
    if FAST:
        training_fields |= {"env_steps": 120, "prefill": 100, "prefill_updates": 20, "batch_size": 8, "train_ratio": 32}
    model = create_world_model("tdmpc2:tiny", **model_fields)
    Trainer(model, TrainingConfig(**training_fields)).train(env)
    return model


def plan_by_hand(model, obs, key):
    """Plan one action for one observation with the parts of the planner."""
    config = model.config
    z = model.encode(obs[None]).z[0]
    mean, std = np.zeros((config.horizon, config.action_dim)), config.max_std
    for iteration, step_key in enumerate(jax.random.split(key, 4)):
        noise = jax.random.normal(step_key, (config.horizon, config.num_samples, config.action_dim))
        candidates = np.clip(mean[:, None] + std * noise, -1, 1)  # [H, N, A]
        values = planner.score(model, z, candidates, step_key)  # rewards, then the value of the last latent: [N]
        refitted = planner.refit(
            candidates, values, num_elites=config.num_elites, temperature=config.temperature,
            min_std=config.min_std, max_std=config.max_std,
        )  # fmt: skip
        mean, std = refitted[0], np.asarray(refitted[1])[:, None]
        print(f"  iteration {iteration}: values {np.mean(values):8.2f} on average, {np.max(values):8.2f} at best; "
              f"first action {np.asarray(mean)[0].round(2)} ± {std[0, 0].round(2)}")  # fmt: skip
    return np.asarray(mean)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of a saved model")
    parser.add_argument("--env", default="Pendulum-v1", help="an environment with continuous actions")
    args = parser.parse_args()

    env = make_env(args.env, seed=1, time_limit=50 if FAST else None)
    model = create_world_model(args.model) if args.model else learn(env)
    obs = env.reset(seed=7).obs
    print(f"Planning at the observation {obs[0].round(2)}, by hand:")
    action = plan_by_hand(model, obs[0], jax.random.key(0))
    _, planned = model.act(None, obs)  # the same in one call, for many environments at a time
    print(f"By hand the mean of the plan is {action.round(2)}; model.act takes {np.asarray(planned)[0].round(2)}.")

    # The same weights without planning: the policy prior, which proposes some of the candidates.
    reflexes = type(model)(model.config.replace(mpc=False))
    reflexes.load_params(model.params)
    with env.another(2 if FAST else 5, seed=2) as other:
        for name, agent in (("with the planner", model), ("by the policy alone", reflexes)):
            returns = [end.episode_return for end in play(agent, other, episodes=other.num_envs)]
            print(f"Return {name}: {np.mean(returns):.1f} ± {np.std(returns):.1f}")
    env.close()


if __name__ == "__main__":
    main()
