"""Time an update or a plan of nicklashansen/tdmpc2 from a checkout of it, with the Python that runs this script.

    python benchmarks/peers/tdmpc2_official.py --checkout DIR --work update [--compile]

Serves the protocol of ``_serve``; run it through ``compare.py``.
"""

import argparse
import importlib.util
import sys
import types
from pathlib import Path

import torch
from _serve import serve
from omegaconf import OmegaConf


def load_for_device(name, path, device):
    """Import a module of the checkout with its hard-coded ``cuda:0`` replaced by ``device``."""
    source = Path(path).read_text(encoding="utf-8").replace("cuda:0", device)
    if device == "cpu":
        # PyTorch refuses capturable optimizers on a CPU, and moving a model to its own device.
        source = source.replace("capturable=True", "capturable=False")
        source = source.replace("WorldModel(cfg).to(self.device)", "WorldModel(cfg)")
    module = types.ModuleType(name)
    module.__file__ = str(path)
    module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
    sys.modules[name] = module
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def make_agent(root, device, args):
    sys.path.insert(0, str(root))
    load_for_device("common.scale", root / "common" / "scale.py", device)
    from common import MODEL_SIZE
    from common.parser import cfg_to_dataclass

    cfg = OmegaConf.load(root / "config.yaml")
    cfg.update(MODEL_SIZE[args.size])
    cfg.update(
        obs_shape={"state": [args.obs_dim]}, action_dim=args.action_dim, multitask=False, tasks=["benchmark"],
        task_dim=0, episode_length=500, episode_lengths=[500], action_dims=[args.action_dim], compile=args.compile,
        batch_size=args.batch_size, bin_size=(cfg.vmax - cfg.vmin) / (cfg.num_bins - 1), model_size=args.size,
        work_dir="", task_title="", obs_shapes=[], seed_steps=0, checkpoint="", data_dir="", exp_name="",
        wandb_project="", wandb_entity="",
    )  # fmt: skip
    return load_for_device("tdmpc2", root / "tdmpc2.py", device).TDMPC2(cfg_to_dataclass(cfg))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--work", choices=["update", "plan"], default="update")
    parser.add_argument("--size", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--obs-dim", type=int, default=24)
    parser.add_argument("--action-dim", type=int, default=6)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    agent = make_agent(args.checkout / "tdmpc2", device, args)
    batch, horizon = args.batch_size, agent.cfg.horizon
    obs = torch.randn(horizon + 1, batch, args.obs_dim, device=device)
    action = torch.rand(horizon, batch, args.action_dim, device=device) * 2 - 1
    reward = torch.rand(horizon, batch, 1, device=device)
    terminated = torch.zeros(horizon, batch, 1, device=device)

    def update():
        torch.compiler.cudagraph_mark_step_begin()
        float(agent._update(obs, action, reward, terminated)["total_loss"])

    def plan():
        agent.act(obs[0, 0].cpu(), t0=False, eval_mode=False)

    serve(
        {"update": update, "plan": torch.no_grad()(plan)}[args.work],
        program="nicklashansen/tdmpc2", torch=torch.__version__, compile=args.compile, device=device,
        threads=torch.get_num_threads(), work=args.work,
    )  # fmt: skip


if __name__ == "__main__":
    main()
