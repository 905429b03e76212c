"""Part ``exact`` of ``accelerator.py``: does this device compute what the reference programs did, and repeat itself?"""

import hashlib
import json
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax
import numpy as np
from accelerator_tasks import Task, in_worker
from accelerator_worker import Failed

ROOT = Path(__file__).resolve().parents[1]
TESTS = {"dreamerv3": ROOT / "tests" / "dreamer", "tdmpc2": ROOT / "tests" / "tdmpc2"}
VARIANTS = {  # name of the file without its ending: seconds of all its tests
    "tdmpc2-single": 120,
    "dreamerv3-vector-discrete": 180,
    "dreamerv3-image-continuous": 240,
    "tdmpc2-episodic": 120,
    "tdmpc2-multitask": 150,
    "tdmpc2-image": 150,
    "dreamerv3-vector-free-nats": 180,
}
ARITHMETIC = {  # name: precision of the model, precision of JAX's products
    "float32": ("float32", "float32"),
    "TF32": ("float32", "tensorfloat32"),
    "bfloat16": ("bfloat16", "default"),
}
FULL = {"JAX_DEFAULT_MATMUL_PRECISION": "float32"}
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def tasks(smoke):
    """Measurements in the order in which they are done."""
    names = ["tdmpc2-single"] if smoke else list(VARIANTS)
    for name in names:
        yield Task(f"golden {name}", VARIANTS[name], lambda place, name=name: golden(place, name))
    for name in names:
        for arithmetic in ["bfloat16"] if smoke else ARITHMETIC:
            yield in_worker(
                f"distance {name} {arithmetic}", 90, "accelerator_exact:distance", name=name, arithmetic=arithmetic
            )
    for name in ["tdmpc2:tiny"] if smoke else ["tdmpc2:5m", "dreamerv3:size12m"]:
        for ending, flags in (("", None),) if smoke else (("", None), (" deterministic", DETERMINISTIC)):
            yield Task(
                f"repeat {name}{ending}", 150,
                lambda place, name=name, flags=flags: repeat(place, name, flags, updates=2 if smoke else 20),
            )  # fmt: skip
    for name in ["toy-online"] if smoke else ["tdmpc2-online", "dreamerv3-online", "toy-jax"]:
        for ending, flags in (("", None),) if smoke else (("", None), (" deterministic", DETERMINISTIC)):
            yield Task(f"resume {name}{ending}", 180, lambda place, name=name, flags=flags: resume(place, name, flags))


def golden(place, name):
    """The tests of one recorded file with their own tolerances, in float32 with products in full precision."""
    family, _, variant = name.partition("-")
    chosen = f"{variant} and test_components" if place.smoke else variant
    env = FULL | ({} if place.smoke else {"WORLDLOOM_TEST_OPTIMIZED": "1"})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # A card's machine has other versions of JAX and NumPy: what these warn of is no wrong value.
        words = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-o", "filterwarnings="]
        words += ["-p", "no:cacheprovider", "-k", chosen]
        words += [f"--junitxml={report}", TESTS[family] / f"test_{TESTS[family].name}_golden.py"]
        code, output, errors = place.run(words, env=env, cwd=ROOT)
        if code not in (0, 1) or not report.exists():
            raise Failed(f"pytest ended with exit code {code}: {output[-1500:]} {errors[-500:]}")
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    wrong = {}
    for case in cases:
        for kind in ("failure", "error"):
            found = case.find(kind)
            if found is not None:
                wrong[case.get("name")] = (found.get("message") or "")[:600]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - skipped - len(wrong)
    if not passed and not wrong:
        raise Failed(f"no test of {name} was run: {output[-500:]}")
    return {"passed": passed, "skipped": skipped, "wrong": wrong}


def recorded_arrays(name):
    """The arrays of a recorded file by name; also makes the tests of its family importable."""
    sys.path.append(str(TESTS[name.partition("-")[0]]))
    with np.load(ROOT / "tests" / "data" / f"{name}-s0.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def distance(name, arithmetic):
    """Largest distance from every recorded value, relative to the largest recorded one of its array."""
    precision, products = ARITHMETIC[arithmetic]
    with jax.default_matmul_precision(products):
        family, _, variant = name.partition("-")
        measured = {"dreamerv3": of_dreamer, "tdmpc2": of_tdmpc2}[family]
        return {"precision": precision, "products": products, **measured(variant, recorded_arrays(name), precision)}


def apart(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise ValueError(f"an array has the shape {actual.shape}, the recorded one {expected.shape}")
    return float(np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), 1e-30))


def of_weights(ours, expected):
    """Distance of weights after three updates: the largest, absolute, and the part of all beyond 1e-5."""
    away = [np.abs(np.asarray(ours[name], np.float64) - value).ravel() for name, value in expected.items()]
    away = np.concatenate(away)
    return {"largest": float(away.max()), "beyond_1e-5": float(np.mean(away > 1e-5))}


def after(data, prefix):
    return {name.removeprefix(prefix): value for name, value in data.items() if name.startswith(prefix)}


def of_dreamer(variant, data, precision):
    """Losses, states, gradients and three updates of DreamerV3."""
    import test_dreamer_golden as tests

    recorded = tests.Recorded(variant, data, precision)
    out, found = recorded.out, {}
    for ours, theirs in tests.TERMS.items():
        found[f"loss {ours}"] = apart(out.terms[ours], data[f"expect/loss/{theirs}"].mean())
    found["total loss"] = apart(out.total, data["expect/total_loss"])
    found["tokens"] = apart(recorded.model.encoder(recorded.observations()), data["expect/tokens"])
    found["deter"] = apart(out.latents.deter, data["expect/feat/deter"])
    found["posterior logits"] = apart(out.posterior_logits, data["expect/feat/logit"])
    # With other logits another category may be the most likely one, and everything after it differs.
    equal = np.asarray(out.latents.stoch) == data["expect/feat/stoch"]
    gradients = after(data, "expect/grad/")
    mine = np.concatenate([np.ravel(recorded.grads[name]) for name in gradients]).astype(np.float64)
    theirs = np.concatenate([np.ravel(each) for each in gradients.values()]).astype(np.float64)
    found["gradient, norm of the difference"] = float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))
    state, losses = tests.three_updates(recorded)
    found["losses of three updates"] = apart(losses, data["expect/train_losses"])
    weights = tests.to_official_dreamerv3(state)
    return {
        "relative": found,
        "equal_latents": float(equal.all(-1).mean()),
        "weights_after_three_updates": of_weights(weights, after(data, "expect/after3/")),
    }


def of_tdmpc2(variant, data, precision):
    """Components, planner stages and three updates of TD-MPC2."""
    import test_tdmpc2_golden as tests

    settings = json.loads(str(data["config"]))
    model = tests.load_official_tdmpc2(data, precision=precision, **tests.overrides(data, settings))
    task = jax.numpy.asarray(data["input/task"]) if "input/task" in data else None
    action, found = data["input/actions"][0], {}
    state = model.encode(data["input/obs"][0], task=task)
    every = jax.numpy.arange(model.config.num_q)
    found["latent"] = apart(state.z, data["expect/z"])
    found["next latent"] = apart(model.predict(state, action, task=task).z, data["expect/next_z"])
    found["reward logits"] = apart(model.reward_logits(state.z, action, task), data["expect/reward_logits"])
    found["Q logits"] = apart(model.q_logits(state.z, action, task), data["expect/q_logits"])
    found["Q values"] = apart(model.q_values(state.z, action, task, every, target=False), data["expect/q"][..., 0])
    z, first = tests.first_latent(model, data, task)
    values = tests.planner.score(model, z, jax.numpy.asarray(data["input/plan_actions"]), task=first)
    found["values of candidates"] = apart(values, data["expect/plan_values"][:, 0])
    previous, noise = jax.numpy.asarray(data["input/plan_prev_mean"]), jax.numpy.asarray(data["input/plan_noise"])
    planned, mean = tests.planner.plan(model, z, previous, None, noise=noise, task=first)
    found["planned action"] = apart(planned, data["expect/plan_action"])
    found["plan"] = apart(mean, data["expect/plan_new_mean"])
    final, metrics = tests.three_updates(model, tests.recorded_rows(data, task), settings)
    for name in ("total_loss", "pi_loss", "grad_norm"):
        if f"expect/metrics/{name}" in data:
            ours = {"total_loss": "loss", "pi_loss": "policy"}.get(name, name)
            found[f"{ours} of three updates"] = apart(metrics[ours], data[f"expect/metrics/{name}"])
    weights = tests.to_official_tdmpc2(final)
    return {"relative": found, "weights_after_three_updates": of_weights(weights, after(data, "after3/"))}


def twice(name, updates, windows):
    """SHA-256 of all weights after some updates on one batch, of two runs of one compiled program."""
    from accelerator_speed import sizes_of
    from work import update_parts

    model, training, batch, state = update_parts(name, **sizes_of(name, "vector", windows))
    update = jax.jit(model.algorithm.make_update(model.config, training.of_update(), model_class=type(model)))
    batch = jax.device_put(batch)
    keys, digests = jax.random.split(jax.random.key(1), updates), []
    for _ in range(2):
        now, found = state, hashlib.sha256()
        for key in keys:
            now, _ = update(now, batch, key)
        for leaf in jax.tree.leaves(now.params):
            found.update(np.asarray(leaf).tobytes())
        digests.append(found.hexdigest())
    return digests


def repeat(place, name, flags, updates):
    """Do two runs give the same weights, bit for bit, within a process and in another one?"""
    from accelerator_speed import windows_of

    arguments = {"name": name, "updates": updates, "windows": windows_of(name, place.smoke)}
    # Compiled anew in each: autotuning may choose other kernels.
    env = {"JAX_ENABLE_COMPILATION_CACHE": "false"} | ({} if flags is None else {"XLA_FLAGS": flags})
    found = [place.ask("accelerator_exact:twice", arguments, env) for _ in range(2)]
    return {
        "updates": updates,
        "flags": flags or "",
        "equal_within_a_process": all(a == b for a, b in found),
        "equal_between_processes": found[0][0] == found[1][0],
    }


def resume(place, name, flags):
    """Does a run that is killed and resumed in a new process end like an undisturbed one? See ``kill_resume.py``."""
    words = [sys.executable, ROOT / "benchmarks" / "kill_resume.py", "--runs", name, "--kills", 1 if place.smoke else 2]
    words += ["--steps", 40 if place.smoke else 100, "--device", "auto"]
    env = FULL | ({} if flags is None else {"XLA_FLAGS": f"{place.env.get('XLA_FLAGS', '')} {flags}".strip()})
    # Each of its processes has the device for itself, one after the other.
    code, output, errors = place.run(words, env=env, cwd=ROOT)
    if code not in (0, 1) or not output.startswith("{"):
        raise Failed(f"kill_resume.py ended with exit code {code}: {errors}")
    found = json.loads(output)
    of_run = {key: found[name][key] for key in ("kills", "lives", "first_steps_seen", "different", "while")}
    return {"equal": found["equal"], "flags": flags or "", **of_run}
