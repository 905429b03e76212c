"""From recorded episodes to world models and their predictions, in a few minutes on a laptop.

Collects episodes of CartPole-v1 and Pendulum-v1, trains a tiny DreamerV3 on the first and a tiny TD-MPC2 on the
second, saves and reloads both, and measures the errors of their imagination on held-out episodes.

    python examples/quickstart.py
"""

import argparse
import json
import time
from pathlib import Path

import gymnasium as gym
import jax
import matplotlib
import numpy as np

from worldloom import create_world_model
from worldloom.training import ReplayBuffer, Trainer, TrainingConfig
from worldloom.training.callbacks import CheckpointCallback, LoggingCallback, ProgressCallback

matplotlib.use("Agg")  # plots to files, no window
import matplotlib.pyplot as plt

CONTEXT = 8  # rows that the model observes before it imagines
HORIZON = 15  # imagined steps
SHOWN = (1, 5, 15)  # steps at which errors are listed


# --- Behaviour policies: uniformly random actions do not explore enough to learn a world model. ------------------


def balance_pole(obs, rng, skill, drift):
    """Push towards the side where the pole falls, with probability ``skill``, biased by ``drift``."""
    lean = obs[2] + 0.4 * obs[3] + 0.08 * obs[0] + 0.15 * obs[1] - drift
    return int(lean > 0) if rng.random() < skill else int(rng.integers(2))


def swing_pendulum(obs, rng, skill, drift):
    """Swing to the energy of the upright pendulum, then hold, with probability ``skill``. Actions are in [-1, 1]."""
    cosine, sine, speed = obs
    excess = 0.5 * speed**2 + 15.0 * (cosine - 1.0)
    near_top = cosine > 0.9 and abs(speed) < 3.0
    wanted = -(8.0 * sine + 2.0 * speed) / 2.0 if near_top else -np.sign(excess) * np.sign(speed + 1e-6)
    action = wanted if rng.random() < skill else rng.normal(drift, 0.6)
    return np.clip([action], -1.0, 1.0).astype(np.float32)


# Scales that bring every observation to about one: small numbers have little weight in a squared error.
UNITS = {"CartPole-v1": np.float32([0.6, 0.5, 0.06, 0.4]), "Pendulum-v1": np.float32([1.0, 1.0, 1.0])}


def collect(env_id, policy, episodes, max_steps, seed):
    """Episodes in Gymnasium layout: n+1 observations, n actions, n rewards, and whether the last step terminated."""
    env = gym.make(env_id, max_episode_steps=max_steps)
    scale = env.action_space.high if isinstance(env.action_space, gym.spaces.Box) else None
    rng = np.random.default_rng(seed)
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        skill, drift = rng.uniform(0.0, 1.0), rng.normal(0.0, 0.1)
        observations, actions, rewards = [obs], [], []
        terminated = truncated = False
        while not (terminated or truncated):
            action = policy(obs, rng, skill, drift)
            obs, reward, terminated, truncated, _ = env.step(action if scale is None else action * scale)
            observations.append(obs)
            actions.append(action)
            rewards.append(reward)
        yield np.float32(observations) / UNITS[env_id], np.asarray(actions), np.float32(rewards), terminated
    env.close()


def fill(env_id, policy, episodes, seed):
    buffer = ReplayBuffer(capacity=100_000)
    for obs, actions, rewards, terminated in collect(env_id, policy, episodes, 200, seed):
        buffer.add_episode(obs, actions, rewards, terminated=terminated)
    return buffer


# --- Training: one call, with a progress bar, checkpoints, TensorBoard and JSON lines in the run folder. ----------


def train(model, buffer, held_out, config, folder, description):
    callbacks = [
        CheckpointCallback(str(folder / "checkpoints"), save_every=config.save_interval),
        LoggingCallback(str(folder), log_to_console=False, log_to_tensorboard=True),
        ProgressCallback(description),
    ]
    trainer = Trainer(model, config, callbacks)
    trainer.train(buffer)
    losses = trainer.evaluate(held_out)
    print(f"{description}: loss {losses['loss']:.3f} on held-out episodes")
    model.save_pretrained(folder / "model")


# --- Evaluation: observe a few rows, imagine the rest, compare with the recorded rows. ----------------------------


def open_loop(model, windows):
    """States imagined after ``CONTEXT`` rows, with the true actions: a trajectory of ``HORIZON`` steps."""
    obs, actions = windows["obs"], windows["actions"]
    state = model.encode(obs[:, 0])
    for t in range(1, CONTEXT):
        state = model.observe(state, actions[:, t - 1], obs[:, t])
    return model.imagine(state, np.swapaxes(actions[:, CONTEXT - 1 : -1], 0, 1))


def encode_rows(model, obs):
    """Latents [..., L] of single observations [..., D] (TD-MPC2 has no memory)."""
    flat = model.encode(obs.reshape(-1, obs.shape[-1])).features
    return np.asarray(flat).reshape(*obs.shape[:-1], -1)


def fit_readout(model, buffer):
    """TD-MPC2 has no decoder; a linear read-out fitted on training rows decodes observations from its latents."""
    obs = buffer.sample(64, 64, seed=1)["obs"]
    with_one = np.pad(encode_rows(model, obs), [(0, 0), (0, 0), (0, 1)], constant_values=1.0)
    design, target = with_one.reshape(-1, with_one.shape[-1]), obs.reshape(-1, obs.shape[-1])
    weights = np.linalg.lstsq(design, target, rcond=1e-4)[0]
    return lambda latents: latents @ weights[:-1] + weights[-1]


def error_by_step(prediction, truth, scale):
    """Root mean square error after 0 … HORIZON steps, [H + 1, B, D] → [H + 1]; columns in units of ``scale``."""
    return np.sqrt(np.mean(np.square((prediction - truth) / scale), axis=(1, 2)))


def evaluate_imagination(model, buffer, held_out):
    """Errors of imagination by step and of the baseline "nothing changes", and trajectories to plot."""
    windows = held_out.sample(256, CONTEXT + HORIZON, seed=0)
    dream = open_loop(model, windows)
    truth = np.swapaxes(windows["obs"][:, CONTEXT - 1 :], 0, 1)
    scale = np.concatenate([episode["obs"] for episode in buffer.episodes()]).std(0)
    errors = {}
    if model.config.model_type == "dreamerv3":
        imagined = np.asarray(model.decode(dream.states)["obs"])
    else:
        latents, true_latents = np.asarray(dream.states.features), encode_rows(model, truth)
        imagined = fit_readout(model, buffer)(latents)
        errors["latent"] = both_errors(latents, true_latents, true_latents.std((0, 1)).mean())
        rewards = np.swapaxes(windows["rewards"][:, CONTEXT - 1 :], 0, 1)[..., None]
        predicted = np.concatenate([rewards[:1], np.asarray(dream.rewards)[..., None]])
        errors["reward"] = both_errors(predicted, rewards, rewards.std())
    errors["observation"] = both_errors(imagined, truth, scale)
    return errors, imagined, truth


def both_errors(prediction, truth, scale):
    still = np.broadcast_to(truth[:1], truth.shape)
    return {"imagined": error_by_step(prediction, truth, scale), "still": error_by_step(still, truth, scale)}


# --- Output. ------------------------------------------------------------------------------------------------------


def print_table(results):
    print("\nOpen-loop error on held-out episodes, in standard deviations (in parentheses: of 'nothing changes')")
    print(f"{'model':30}{'quantity':14}" + "".join(f"{f'imagined step {k}':>22}" for k in SHOWN))
    for title, errors in results.items():
        for quantity in sorted(errors, key=["observation", "reward", "latent"].index):
            cells = [f"{errors[quantity]['imagined'][k]:.3f} ({errors[quantity]['still'][k]:.3f})" for k in SHOWN]
            print(f"{title:30}{quantity:14}" + "".join(f"{cell:>22}" for cell in cells))


def draw(drawings, path):
    columns = max(truth.shape[-1] for _, truth, _ in drawings.values())
    figure, axes = plt.subplots(len(drawings), columns, figsize=(3.2 * columns, 2.6 * len(drawings)), squeeze=False)
    for row, (title, (imagined, truth, names)) in zip(axes, drawings.items(), strict=True):
        for axis in row[len(names) :]:
            axis.axis("off")
        for i, name in enumerate(names):
            for window, colour in zip(range(3), ("tab:blue", "tab:orange", "tab:green"), strict=True):
                row[i].plot(truth[:, window, i], color=colour)
                row[i].plot(imagined[:, window, i], color=colour, linestyle="--")
            row[i].set(title=f"{title}\n{name}" if i == 0 else f"\n{name}", xlabel="imagined steps")
    figure.suptitle("Three held-out episodes: recorded (solid) and imagined (dashed)")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


JOBS = [
    {
        "title": "DreamerV3 on CartPole-v1",
        "env": "CartPole-v1",
        "policy": balance_pole,
        "model": "dreamerv3:tiny",
        "shapes": {"obs_shape": (4,), "action_dim": 2, "action_type": "discrete"},
        "names": ("position", "velocity", "angle", "angular velocity"),
        # Offline, only the world model matters: more weight on it, and short imagination for actor and critic.
        "config": {"reconstruction_scale": 30.0, "kl_free": 0.1, "kl_scale": 0.3, "imagination_horizon": 5},
        "training": {"learning_rate": 2e-3, "warmup_steps": 50, "grad_clip": 0.0, "sequence_length": 32},
        "updates": 1000,
    },
    {
        "title": "TD-MPC2 on Pendulum-v1",
        "env": "Pendulum-v1",
        "policy": swing_pendulum,
        "model": "tdmpc2:tiny",
        "shapes": {"obs_shape": (3,), "action_dim": 1},
        "names": ("cos θ", "sin θ", "speed"),
        "config": {"episode_length": 200},
        "training": {"learning_rate": 1e-3, "grad_clip": 20.0, "sequence_length": 16, "batch_size": 32},
        "updates": 2000,
    },
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / time.strftime("quickstart-%Y%m%d-%H%M%S"))
    parser.add_argument("--episodes", type=int, default=100, help="training episodes per environment")
    parser.add_argument("--updates", type=int, help="updates per model (default: enough to see it work)")
    args = parser.parse_args()
    start = time.perf_counter()
    print(f"Running on {jax.devices()[0].device_kind} ({jax.default_backend()}); results go to {args.out}")

    results, drawings = {}, {}
    for job in JOBS:
        folder = args.out / job["model"].partition(":")[0]
        buffer = fill(job["env"], job["policy"], args.episodes, seed=0)
        held_out = fill(job["env"], job["policy"], max(args.episodes // 5, 5), seed=10_000)
        print(f"\n{job['title']}: {buffer}")
        model = create_world_model(job["model"], **job["shapes"], **job["config"])
        updates = args.updates or job["updates"]
        config = TrainingConfig(
            **job["training"], total_steps=updates, log_interval=50, save_interval=max(updates // 2, 1), device="auto"
        )
        train(model, buffer, held_out, config, folder, job["title"])

        # The saved model is evaluated.
        reloaded = create_world_model(folder / "model")
        errors, imagined, truth = evaluate_imagination(reloaded, buffer, held_out)
        _, original, _ = evaluate_imagination(model, buffer, held_out)
        same = np.array_equal(imagined, original)
        print(f"{job['title']}: the reloaded model predicts {'bit for bit the same' if same else 'SOMETHING ELSE'}")
        results[job["title"]], drawings[job["title"]] = errors, (imagined, truth, job["names"])

    print_table(results)
    draw(drawings, args.out / "imagination.png")
    listed = {
        title: {quantity: {k: v.tolist() for k, v in pair.items()} for quantity, pair in errors.items()}
        for title, errors in results.items()
    }
    (args.out / "errors.json").write_text(json.dumps(listed, indent=2))
    print(f"\nThe picture is {args.out / 'imagination.png'}; TensorBoard (pip install tensorboard) shows {args.out}.")
    print(f"Done in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
