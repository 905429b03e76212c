"""Writes the ``newt-*`` files of this folder with the program of ``nicklashansen/newt`` itself.

Run by hand, where PyTorch, tensordict, hydra-core and termcolor are installed: ``python make_newt_files.py CHECKOUT``.
The files here are of its commit 75def92 with PyTorch 2.13.0 on a CPU.

The agent is built by its own classes, trained for one update on random data, and written by its own ``save``. Its
initial weights, which are zero in places, are replaced by random ones first. The program names CUDA devices; here they
are the CPU, and nothing else of it is replaced. Draws are those of PyTorch's generator, and recorded with the inputs.
"""

import copy
import pathlib
import sys
import types

import numpy as np
import torch

FOLDER = pathlib.Path(__file__).parent
OBS_DIM, ACTION_DIM, ROWS = 7, 4, 12
EPISODE_LENGTHS = (500, 100, 25, 1000)
# Text embeddings of the program's tasks have norms from 14 to 18.
EMBEDDING_NORMS = (3.0, 15.6, 0.5, 9.0)


class OnCPU(types.ModuleType):
    """PyTorch, whose every device is the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    @staticmethod
    def device(*_: object) -> torch.device:
        """The CPU."""
        return torch.device("cpu")


class RandomData:
    """What the agent asks of a replay buffer: ``sample``."""

    def __init__(self, cfg: object, task: torch.Tensor) -> None:
        self.cfg, self.task = cfg, task

    def sample(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Observations [H+1, B, D], actions [H, B, A], rewards [H, B, 1], tasks [H, B]."""
        steps, rows = self.cfg.horizon, self.cfg.batch_size
        obs = torch.randn(steps + 1, rows, OBS_DIM)
        action, reward = torch.rand(steps, rows, ACTION_DIM) * 2 - 1, torch.randn(steps, rows, 1)
        return tuple(x.to(device) for x in (obs, action, reward, self.task.expand(steps, rows)))


def config(*, action_dims: tuple[int, ...], task_dim: int) -> object:
    """The program's config with small networks, and what it fills in when it makes its environments."""
    from common.math import discount_heuristic
    from config import Config

    cfg = Config(task="soup" if task_dim else "walker-run", compile=False, use_demos=False, batch_size=ROWS)
    cfg.num_enc_layers, cfg.enc_dim, cfg.mlp_dim, cfg.latent_dim, cfg.num_q = 2, 12, 16, 24, 3
    cfg.task_dim, cfg.action_dims = task_dim, list(action_dims)
    cfg.num_envs = cfg.num_tasks = len(action_dims)
    cfg.bin_size = (cfg.vmax - cfg.vmin) / (cfg.num_bins - 1)
    cfg.obs_shape, cfg.action_dim = {"state": (OBS_DIM,)}, ACTION_DIM
    embeddings = torch.nn.functional.normalize(torch.randn(len(action_dims), max(task_dim, 1)), dim=-1)
    norms = torch.tensor(EMBEDDING_NORMS[: len(action_dims)])[:, None]
    cfg.task_embeddings = (norms * embeddings).tolist()
    cfg.episode_lengths = list(EPISODE_LENGTHS[: len(action_dims)]) if task_dim else [500] * len(action_dims)
    cfg.episode_length = max(cfg.episode_lengths)
    cfg.discounts = [discount_heuristic(cfg, length) for length in cfg.episode_lengths]
    return cfg


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Give every weight but the task embeddings a value that no output is independent of."""
    for name, weight in model.named_parameters():
        if name == "_task_emb.weight":
            continue
        scale = weight.shape[-1] ** -0.5 if weight.ndim == 2 else 0.3
        weight.copy_(torch.randn(weight.shape) * scale + (1.0 if name.endswith("ln.weight") else 0.0))
    # Small standard deviations: where tanh is saturated, log(1 - action² + 1e-6) is the log of a rounding error.
    model._pi[-1].bias[ACTION_DIM:] -= 0.7


@torch.no_grad()
def outputs(agent: torch.nn.Module, obs: torch.Tensor, action: torch.Tensor, task: torch.Tensor) -> dict[str, object]:
    """Draws and outputs of every function of the world model, and the agent's action without planning."""
    from common.math import two_hot_inv

    model, cfg = agent.model, agent.cfg
    z = model.encode(obs, task)
    reward = model.reward(z, action, task)
    found = {
        "expect/z": z,
        "expect/next_z": model.next(z, action, task),
        "expect/reward_logits": reward,
        "expect/reward": two_hot_inv(reward, cfg),
        "expect/mean_action": agent(obs, t0=None, eval_mode=True, task=task, mpc=False),
    }
    torch.manual_seed(1)
    found["input/noise"] = torch.randn(len(obs), ACTION_DIM)
    torch.manual_seed(1)
    found["expect/pi_action"], info = model.pi(z, task)
    assert found["expect/pi_action"].abs().max() < 0.95
    found |= {f"expect/pi_{name}": value for name, value in info.items()}
    torch.manual_seed(2)
    found["input/pair"] = torch.randperm(cfg.num_q)[:2]
    for suffix, target in (("", False), ("_target", True)):
        found[f"expect/q_logits{suffix}"] = model.Q(z, action, task, return_type="all", target=target)
        for form in ("min", "avg"):
            torch.manual_seed(2)
            found[f"expect/q_{form}{suffix}"] = model.Q(z, action, task, return_type=form, target=target)
    return found


def record(name: str, cfg: object, task: torch.Tensor) -> None:
    """Write ``newt-{name}-s0.pt`` and ``.npz``."""
    from common.world_model import WorldModel
    from tdmpc2 import TDMPC2

    model = WorldModel(cfg)
    randomize(model)
    agent = TDMPC2(model, cfg)
    initial = copy.deepcopy(model.state_dict())
    agent.update(RandomData(cfg, task))
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, initial[key])]
    assert len(moved) == sum(parameter.requires_grad or "target" in key for key, parameter in model.named_parameters())
    agent.save(FOLDER / f"newt-{name}-s0.pt")

    obs, action = torch.randn(ROWS, OBS_DIM), torch.rand(ROWS, ACTION_DIM) * 2 - 1
    if not cfg.task_dim:
        action = action * model._action_masks[task]  # The program plans with masked actions only.
    arrays = {"input/obs": obs, "input/action": action, "input/task": task} | outputs(agent, obs, action, task)
    np.savez_compressed(
        FOLDER / f"newt-{name}-s0.npz",
        **{key: value.numpy() for key, value in arrays.items()},
        episode_lengths=np.array(cfg.episode_lengths),
        discounts=np.array(cfg.discounts),
        action_dims=np.array(cfg.action_dims),
    )


def main() -> None:
    """Write the files."""
    sys.path.insert(0, str(pathlib.Path(sys.argv[1]) / "tdmpc2"))
    import common.scale
    import tdmpc2

    common.scale.torch = tdmpc2.torch = OnCPU()
    torch.manual_seed(0)
    tasks = torch.arange(ROWS) % 4
    record("multitask", config(action_dims=(4, 2, 1, 3), task_dim=6), tasks)
    # Its single-task models have one environment after the other as tasks, and unused actions too.
    record("single", config(action_dims=(3, 3), task_dim=0), torch.arange(ROWS) % 2)


if __name__ == "__main__":
    main()
