"""Programs for eight virtual devices, each run in a process of its own: ``python mesh_programs.py NAME ARGUMENTS``.

The last line of a program's output is its result as JSON.
"""

import json
import os
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    devices = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from worldloom import create_world_model
from worldloom.cli.mesh_report import collective_bytes, collectives
from worldloom.interop import load_official_tdmpc2, to_official_tdmpc2
from worldloom.interop.dreamerv3 import load_official_dreamerv3, official_name
from worldloom.models.params import flatten
from worldloom.sharding import Placement
from worldloom.training import TrainingConfig
from worldloom.training.update_loop import CompiledUpdate, Learner, NonFiniteGuard

DATA = Path(__file__).resolve().parents[1] / "data"
ROWS = ("obs", "actions", "rewards", "is_first", "is_last", "is_terminal")


def recorded_dreamer(variant):
    """Model, batch of 24 windows, and recorded values. The recorded windows are repeated: their means stay the same."""
    with np.load(DATA / f"dreamerv3-{variant}-s0.npz") as file:
        data = dict(file)
    config = json.loads(str(data["config"]))
    model = load_official_dreamerv3(
        {name.removeprefix("params/"): value for name, value in data.items() if name.startswith("params/")},
        obs_shape=data["input/obs"].shape[2:],
        action_dim=config["action_dim"],
        action_type="discrete" if config["discrete"] else "continuous",
        num_categories=config["classes"],
        precision="float32",
    )
    batch = {name: data[f"input/{name}"] for name in ROWS}
    repeats = 24 // len(batch["rewards"])
    return model, {name: np.concatenate([value] * repeats) for name, value in batch.items()}, data


def recorded_tdmpc2(variant):
    """Model, batch of 8 windows, recorded values, and the reference's settings."""
    with np.load(DATA / f"tdmpc2-{variant}-s0.npz") as file:
        data = dict(file)
    settings = json.loads(str(data["config"]))
    names = "horizon num_samples num_elites num_pi_trajs iterations episode_length simnorm_dim rho tau entropy_coef"
    fields = {name: settings[name] for name in names.split()} | {"encoder_lr_scale": settings["enc_lr_scale"]}
    model = load_official_tdmpc2(data, precision="float32", **fields)
    arrived = lambda x: np.concatenate([np.zeros_like(x[:1]), x])[..., 0].T  # noqa: E731
    actions = data["input/actions"]
    batch = {
        "obs": data["input/obs"].swapaxes(0, 1),
        "actions": np.concatenate([actions, np.zeros_like(actions[:1])]).swapaxes(0, 1),
        "rewards": arrived(data["input/rewards"]),
        "is_terminal": arrived(data["input/terminated"]),
    }
    return model, batch, data, settings


def compiled_modes(model, training, placement):
    """The update with every draw replaced by its mode, its learner, and the names of its metrics."""
    algorithm = model.algorithm
    update = algorithm.make_update(model.config, training, model_class=type(model))
    modes = lambda state, batch, _: update(state, batch, None)  # noqa: E731
    call = CompiledUpdate(modes, algorithm.loss_terms, False, False, True, placement)
    state = placement.put_state(algorithm.init_state(model, training, jax.random.key(0)))
    return call, Learner(state, placement.put_state(NonFiniteGuard.create()))


def updates(model, batch, training, mesh, count):
    """Metrics of ``count`` updates by name, and the state after them."""
    placement = Placement.of(mesh, jax.devices()[0])
    call, learner = compiled_modes(model, training, placement)
    batches = placement.put_batches({name: value[None] for name, value in batch.items()}, len(batch["rewards"]))
    with placement.context():
        names = call.metric_names(learner.state, batches)
    program, rows = call.lower(learner, batches).compile(), []
    about = described(program, learner.state)
    for _ in range(count):
        learner, output = program(*learner, batches, 1, None)
        rows.append(np.asarray(output.metrics)[0])
    return dict(zip(names, np.array(rows).T.tolist(), strict=True)), learner, about


def tdmpc2_updates(variant, *meshes):
    """Three updates of a recorded batch on each mesh: errors against the recording, and against the first mesh."""
    model, batch, data, settings = recorded_tdmpc2(variant)
    found, first = [], None
    for mesh in map(json.loads, meshes):
        training = TrainingConfig(
            learning_rate=settings["lr"], grad_clip=settings["grad_clip_norm"], batch_size=8, device="cpu", mesh=mesh
        )
        metrics, learner, about = updates(model, batch, training.of_update(), mesh, 3)
        state = learner.state.replace(params=jax.tree.map(jnp.asarray, jax.device_get(learner.state.params)))
        weights = to_official_tdmpc2(state)
        errors = [
            np.abs(weights[name.removeprefix("after3/")] - value).max()
            for name, value in data.items()
            if name.startswith("after3/")
        ]
        expected = {
            "loss": data["expect/metrics/total_loss"].tolist(),
            "policy": data["expect/metrics/pi_loss"].tolist(),
        }
        first = first or weights
        moved = max(np.abs(weights[name] - value).max() for name, value in first.items())
        specs = sorted({str(getattr(x.sharding, "spec", "")) for x in jax.tree.leaves(learner.state.params)})
        found.append(
            {
                "metrics": metrics,
                "expected": expected,
                "off": float(max(errors)),
                "from_first": float(moved) / settings["lr"],
                "specs": specs,
                **about,
            }
        )
    return found


def dreamer_losses(variant, *meshes):
    """Loss terms and gradients of a recorded batch on each mesh: relative errors against the recording."""
    from worldloom.models.base import merge
    from worldloom.models.dreamer import DreamerV3WorldModel

    model, batch, data = recorded_dreamer(variant)
    terms = {"reconstruction": "obs", "reward": "rew", "continue": "con", "dynamics": "dyn", "representation": "rep"}
    terms |= {"actor": "policy", "critic": "value", "replay_critic": "repval"}

    def objective(params, batch):
        out = merge(DreamerV3WorldModel, model.config, params).losses(batch)
        return out.total, out.terms

    found = []
    for mesh in map(json.loads, meshes):
        placement = Placement.of(mesh, jax.devices()[0])
        params = placement.put_state(jax.tree.map(np.asarray, model.params))
        rows = jax.tree.map(lambda x: x[0], placement.put_batches({k: v[None] for k, v in batch.items()}, 24))
        with placement.context():
            rows = jax.device_put(rows, placement.rows() or placement.device)
            grads, losses = jax.jit(jax.grad(objective, has_aux=True))(params, rows)
        grads = {official_name(name): np.asarray(g) for name, g in flatten(grads).items()}
        of_grads = {
            name: relative(grads[name], data[f"expect/grad/{name}"])
            for name in grads
            if f"expect/grad/{name}" in data and not name.startswith("pol/head/action/mean")
        }
        found.append(
            {
                "terms": {n: relative(losses[n], data[f"expect/loss/{t}"].mean()) for n, t in terms.items()},
                "grads": max(of_grads.values()),
            }
        )
    return found


def relative(actual, expected):
    """Largest error, relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30))


def random_batch(model, training):
    """A batch of random windows for any model."""
    spec, config = model.algorithm.replay_spec(model.config, training), model.config
    shape, rng = (training.batch_size, spec.rows), np.random.default_rng(0)
    image = len(config.obs_shape) == 3
    obs = rng.integers(0, 256, (*shape, *config.obs_shape)) if image else rng.normal(size=(*shape, *config.obs_shape))
    batch = {
        "obs": obs.astype(np.uint8 if image else np.float32),
        "actions": rng.uniform(-1, 1, (*shape, config.action_dim)).astype(np.float32),
        "rewards": rng.normal(size=shape).astype(np.float32),
        **{name: np.zeros(shape, bool) for name in ("is_first", "is_last", "is_terminal")},
    }
    if spec.latents:
        batch["context"] = {n: np.zeros((shape[0], *each), np.float32) for n, each in spec.latents.items()}
    return batch


def compiled_text(name, obs_shape, fields, *meshes):
    """FLOPs per device and collectives of the compiled update on each mesh."""
    fields = json.loads(fields)
    model = create_world_model(name, obs_shape=json.loads(obs_shape), action_dim=3, device="cpu")
    found = []
    for mesh in map(json.loads, meshes):
        training = TrainingConfig(device="cpu", mesh=mesh, **fields)
        placement = Placement.of(mesh, jax.devices()[0])
        algorithm = model.algorithm
        update = algorithm.make_update(model.config, training.of_update(), model_class=type(model))
        call = CompiledUpdate(update, algorithm.loss_terms, False, False, True, placement)
        state = placement.put_state(algorithm.init_state(model, training.of_update(), jax.random.key(0)))
        batch = jax.tree.map(lambda x: x[None], random_batch(model, training))
        batches = placement.put_batches(batch, training.batch_size)
        learner = Learner(state, placement.put_state(NonFiniteGuard.create()))
        program = call.lower(learner, batches).compile()
        found.append(described(program, state))
    return found


def restored_elsewhere(family, folder, fields):
    """First metrics after each restore of one run on 8, 2, 1 and 8 devices, and those of the unbroken run."""
    import toy_family

    from worldloom.replay import ReplayBuffer
    from worldloom.training import Trainer
    from worldloom.training.callbacks import CheckpointCallback

    rows = {}

    def note(info):
        rows[info.step] = dict(info.metrics)

    def train(mesh, steps, resume, callbacks=()):
        if family == "toy":
            buffer = toy_family.fill(ReplayBuffer(1_000, latents={"memory": (1,)}))
            model = toy_family.ToyWorldModel(toy_family.ToyConfig(latents=True))
        else:
            kind = {"episodic": True} if family.startswith("tdmpc2") else {}  # The toy episodes end.
            model = create_world_model(family, obs_shape=(2,), action_dim=1, device="cpu", precision="float32", **kind)
            buffer = toy_family.fill(ReplayBuffer(1_000))
        config = TrainingConfig(device="cpu", batch_size=16, mesh=mesh, learning_rate=1e-3, **json.loads(fields))
        Trainer(model, config, [(1, note), *callbacks]).train(buffer, total_steps=steps, resume=resume)

    meshes = [{"data": 2, "fsdp": 4}, {"data": 2}, {}, {"data": 8}]
    train(meshes[0], 4 * 2, False)
    unbroken, found = dict(rows), []
    rows.clear()
    for number, mesh in enumerate(meshes):
        train(mesh, 2 * (number + 1), number > 0, [CheckpointCallback(folder, save_every=2)])
        found.append(rows[2 * number + 1])
    return [{n: [row[n], unbroken[2 * k + 1][n]] for n in row} for k, row in enumerate(found)]


def members(kind, folder):
    """Four members of a toy family on one device and on two: what they differ in, and every compiled call on two.

    Those with stored latents are also stopped and go on elsewhere.
    """
    import jax_worlds

    from worldloom.families import _registered
    from worldloom.training import train_many
    from worldloom.training.on_device import fit

    model = jax_worlds.variant("LikeDreamer", cross_episodes=True, fresh_first=True)
    if kind == "prefill":
        model = jax_worlds.variant("LikeTDMPC2", open_episodes=False, random_prefill=True)
    _registered["toy"] = _registered["toy"]._replace(model_class=model, algorithm=model.algorithm)
    two, calls, compiled_loop = {"data": 2}, {}, fit._compiled_loop

    def watched(*arguments):
        loop = compiled_loop(*arguments)
        if loop._mesh is not None:
            for name in ("train", "collect", "collect_random", "choose"):
                setattr(loop, name, noted(name, getattr(loop, name)))
        return loop

    def noted(name, call):
        def first_describe(*given):
            if name not in calls:
                text = call.lower(*given).compile().as_text()
                arrays = [x for x in jax.tree.leaves(given) if isinstance(x, jax.Array) and x.ndim]
                divided = all(x.sharding.spec == P("members") for x in arrays)
                parts = int(re.search(r"num_partitions=(\d+)", text).group(1))
                calls[name] = {"moved": collective_bytes(text), "parts": parts, "divided": divided}
            return call(*given)

        return first_describe

    def train(name, steps, mesh, resume=False):
        # Ratios differ, so that one member steps its environments while another one updates.
        vary = {"learning_rate": [1e-2, 3e-3], "train_ratio": [12.0, 4.0]}
        options = {"num_envs": 2, "model": {"latents": kind != "prefill"}, "eval_episodes": 2, "eval_interval": 20}
        options |= {"folder": Path(folder) / name, "save_interval": 20, "total_steps": steps, "resume": resume}
        found = train_many("toy", jax_worlds.DRIFT, [5], vary, jax_worlds.CONFIG, mesh=mesh, **options)
        return [content(member) for member in found]

    def content(member):
        lines = [json.loads(line) for line in (member.run.path / "metrics.jsonl").read_text().splitlines()]
        episodes = [json.loads(line) for line in (member.run.path / "episodes.jsonl").read_text().splitlines()]
        logged = [line[name] for line in lines for name in ("train/loss", "eval/return") if name in line]
        (where,) = {str(x.device) for x in jax.tree.leaves(member.model.params)}
        return {
            "weights": np.concatenate([np.ravel(x) for x in jax.tree.leaves(member.model.params)]),
            "logged": np.array(logged),
            "returns": np.array([line["return"] for line in episodes]),
            "mesh": member.run.settings()["training"]["mesh"],
            "model is on": where,
        }

    def apart(ones, others):
        """Largest difference of each number, over the members."""
        names = ("weights", "logged", "returns")
        assert all(len(one[name]) > 1 for one in ones for name in names)
        return {n: float(max(np.abs(a[n] - b[n]).max() for a, b in zip(ones, others, strict=True))) for n in names}

    one = train("one", 40, {})
    fit._compiled_loop = watched
    on_two = train("two", 40, two)
    fit._compiled_loop = compiled_loop
    differences = {"two": apart(one, on_two)}
    if kind == "latents":
        train("to-two", 20, {})
        differences["to two"] = apart(one, train("to-two", 40, two, resume=True))
        train("to-one", 20, two)
        differences["to one"] = apart(one, train("to-one", 40, {}, resume=True))
    return {
        "calls": calls,
        "differences": differences,
        "between members": float(
            min(np.abs(a["weights"] - b["weights"]).max() for a, b in zip(one[1:], one, strict=False))
        ),
        "meshes": [each["mesh"] for each in on_two],
        "models are on": sorted({each["model is on"] for each in on_two}),
    }


def described(program, state):
    """FLOPs per device of a compiled update, and what it moves between devices."""
    text, weights = program.as_text(), {x.shape for x in jax.tree.leaves(state.params)}
    gathered = [shape for _, shape in collectives(text).get("all-gather", [])]
    loops = set(re.findall(r"body=%?([\w.\-]+)", text))
    return {
        "flops": program.cost_analysis()["flops"],
        "bytes": collective_bytes(text),
        "gathered": [shape for shape in gathered if not is_weight(shape, weights)],
        "weights_gathered": sum(is_weight(shape, weights) for shape in gathered),
        "in_loops": sorted({kind for name, kind in named_collectives(text) if name in loops}),
    }


def is_weight(shape, weights):
    """Whether an array of this shape is one of the matrices that may be divided, possibly transposed."""
    return len(shape) > 1 and any(sorted(shape) == sorted(weight) for weight in weights)


def named_collectives(text):
    """Name of the computation and kind of every collective in a compiled program."""
    for body in re.split(r"\n(?=[%\w])", text):
        name = body.removeprefix("ENTRY ").lstrip("%").split(" ")[0]
        yield from ((name, kind) for kind in collectives(body))


if __name__ == "__main__":
    print("\n" + json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
