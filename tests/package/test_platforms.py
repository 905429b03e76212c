"""What is handed to the compilers of GPUs and TPUs, seen from a machine without one."""

import re

import jax
import numpy as np
import pytest

from worldloom import create_world_model
from worldloom.training import ReplayBuffer, TrainingConfig
from worldloom.training.collector import compiled_policy

MODELS = {
    "dreamerv3 of vectors": ("dreamerv3:tiny", (5,), {}),
    "dreamerv3 of images": ("dreamerv3:tiny", (48, 48, 3), {"cnn_depth": 4}),
    "tdmpc2 of vectors": ("tdmpc2:tiny", (5,), {"episodic": True}),
    "tdmpc2 of images": ("tdmpc2:tiny", (64, 64, 3), {"latent_dim": 512}),
}
PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution)\b.*")


@pytest.fixture(scope="module", params=MODELS)
def programs(request):
    """(update with its arguments, acting with its arguments) of a model in bfloat16."""
    preset, shape, fields = MODELS[request.param]
    model = create_world_model(preset, obs_shape=shape, action_dim=2, precision="bfloat16", **fields)
    config = TrainingConfig(batch_size=2, sequence_length=6)
    algorithm, draw = model.algorithm, np.random.default_rng(0)
    obs = draw.normal(size=(31, *shape)).astype(np.float32)
    if len(shape) == 3:
        obs = draw.integers(0, 256, (31, *shape)).astype(np.uint8)
    buffer, spec = ReplayBuffer(100), algorithm.replay_spec(model.config, config)
    buffer.add_episode(obs, draw.uniform(-1, 1, (30, 2)).astype(np.float32), draw.normal(size=30), truncated=True)
    buffer.ensure_latents(spec.latents)
    batch = buffer.sample(2, spec.rows, latents=bool(spec.latents))
    del batch["row_ids"]
    state = algorithm.init_state(model, config.of_update(), jax.random.key(0))
    carry = algorithm.initial_carry(model.config, 3)
    update = algorithm.make_update(model.config, config.of_update(), model_class=type(model))
    act = compiled_policy(algorithm.policy, type(model), model.config)
    return [
        (jax.jit(update, donate_argnums=0), (state, batch, jax.random.key(0))),
        (act, (state.params, state.key, carry, obs[:3], np.ones(3, bool), 1)),
    ]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_hold_nothing_that_only_a_cpu_has(programs, platform):
    """Updates and acting lower; every product of activations is one of bfloat16, and nothing grows to 64 bits."""
    for program, arguments in programs:
        text = program.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
        assert "custom_call" not in text
        assert "f64" not in text
        products = PRODUCT.findall(text)
        wide = [line for line in products if "xbf16>, tensor" not in line]
        assert len(products) > len(wide)
        # Kernels of convolutions are put together, and elites averaged, in full precision.
        assert all("precision = [HIGHEST, HIGHEST]" in line for line in wide)
