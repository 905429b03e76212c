"""One process of several that save and restore a state: ``python checkpoint_process.py SETTINGS``, which are JSON.

``id, count, port`` name the process, ``devices`` are its virtual devices. It saves the steps ``save`` over ``mesh`` in
``folder``; at step ``fail`` its disk is full, at step ``die`` it kills itself once its files are written, and at step
``bad`` a weight is NaN. It then restores what ``restore`` lists, [folder, mesh] each. The last line of its output is
its result as JSON.
"""

import errno
import json
import os
import signal
import socket
import sys
import warnings

if __name__ == "__main__":
    SETTINGS = json.loads(sys.argv[1])
    devices = f"--xla_force_host_platform_device_count={SETTINGS['devices']}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from worldloom import distributed
from worldloom.algorithm import TrainState
from worldloom.errors import CheckpointError, NonFiniteError
from worldloom.sharding import Placement
from worldloom.training import checkpoint_files, shared_checkpoint
from worldloom.training.checkpoint import Checkpointer
from worldloom.training.checkpoint_files import FORMAT, Snapshot

IDENTITY = {"config": {"model_type": "none"}, "training": {"mesh": {}}, "model_class": "tests:None"}


def free_port():
    """A port of this machine that nobody uses now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def host_state(step, *, bad=False):
    """A state of random numbers: two weights and their moments, of which the matrices are large enough to divide."""
    rng = np.random.default_rng(step)

    def weights():
        return {"w": rng.normal(size=(256, 192)).astype(np.float32), "b": np.arange(5, dtype=np.float32)}

    count = np.int32(step)[...]
    state = TrainState(count, weights(), {"mu": weights(), "count": count}, jax.random.key(7))
    if bad:
        state.params["w"][-1, -1] = np.nan  # in the part of the last device
    return state


def record(step):
    return {"format": FORMAT, "step": step, "skipped": 0, "run_id": "one", "processes": jax.process_count(), **IDENTITY}


def snapshot(step, placement, **kind):
    state = host_state(step, **kind)
    placed = placement.put_state(state) if placement.spans_processes else state
    around = {"collector/rows": np.full(3, step)} if distributed.is_primary() else {}
    return Snapshot(placed.replace(step=state.step, key=state.key), record(step), around)


def restored(folder, mesh):
    """What the newest checkpoint in ``folder`` is, read onto ``mesh``; all numbers of this process are compared."""
    placement = Placement.of(mesh, jax.local_devices()[0])
    template = placement.put_state(host_state(0))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = Checkpointer(folder).restore(template, IDENTITY)
    expected = host_state(found.step)
    for array, value in zip(jax.tree.leaves(found.state), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array, value = jax.random.key_data(array), jax.random.key_data(value)
        parts = [(shard.data, shard.index) for shard in getattr(array, "addressable_shards", [])] or [(array, ...)]
        for part, index in parts:
            np.testing.assert_array_equal(np.asarray(part), np.asarray(value)[index])
    weights = found.state.params["w"]
    return {
        "step": found.step,
        "spec": str(getattr(getattr(weights, "sharding", None), "spec", None)),
        "rows": found.arrays["collector/rows"].tolist(),
        "warned": [str(each.message) for each in warned],
    }


def main():
    if SETTINGS["count"] > 1:
        distributed.initialize(f"localhost:{SETTINGS['port']}", SETTINGS["count"], SETTINGS["id"], timeout=20)
    placement = Placement.of(SETTINGS["mesh"], jax.local_devices()[0])
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: 0 * x, tree), donate_argnums=0)
    checkpoints, errors = Checkpointer(SETTINGS["folder"]), {}
    checkpoints.open("one")
    sync = checkpoint_files.fsync_tree

    for step in SETTINGS["save"]:

        def written(folder, step=step):
            if step == SETTINGS.get("die"):
                os.kill(os.getpid(), signal.SIGKILL)
            if step == SETTINGS.get("fail"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(folder)

        shared_checkpoint.fsync_tree = checkpoint_files.fsync_tree = written
        taken = snapshot(step, placement, bad=step == SETTINGS.get("bad"))
        try:
            checkpoints.save(taken)
            if placement.spans_processes:
                overwrite((taken.state.params, taken.state.opt_state))  # as the next update does, while it is written
            checkpoints.wait()
        except (CheckpointError, NonFiniteError) as error:
            errors[step] = f"{type(error).__name__}: {error}"
    checkpoints.close()
    found = [restored(folder, mesh) for folder, mesh in SETTINGS["restore"]]
    print("\n" + json.dumps({"errors": errors, "restored": found}))


if __name__ == "__main__":
    main()
