"""TDMPC2Config: parameter counts of presets (nothing is allocated), derived values, refused values."""

import json
import warnings

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom.errors import ConfigError, UnknownFieldError
from worldloom.models.compilation import abstract_params
from worldloom.models.params import count_parameters
from worldloom.models.pictures import picture_layout
from worldloom.models.tdmpc2 import TDMPC2Config, TDMPC2WorldModel
from worldloom.models.tdmpc2.config import picture_convolutions, picture_features
from worldloom.models.tdmpc2.encoders import make_encoder


def encoder_params(config):
    """Shapes of the encoder's weights alone, which take a fraction of the model's time."""
    build = lambda: make_encoder(config, jnp.dtype(jnp.float32), nnx.Rngs(0))  # noqa: E731
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(build)))


def make(**fields):
    return TDMPC2Config(**({"obs_shape": (39,), "action_dim": 6} | fields))


def count(config):
    params = abstract_params(TDMPC2WorldModel, config)
    return count_parameters({name: part for name, part in params.items() if name not in TDMPC2WorldModel.untrained})


SINGLE = {"1m": 1_214_651, "5m": 4_960_618, "19m": 18_062_442, "48m": 47_208_298, "317m": 312_595_417}
MT80 = {"1m": 1_435_067, "5m": 5_389_930, "19m": 18_970_218, "48m": 48_791_146, "317m": 317_383_129}
MT30 = {"1m": 1_426_427, "5m": 5_241_066, "19m": 16_031_210, "48m": 48_242_410, "317m": 317_316_889}
PARTS = {
    "1m": (40_064, 250_752, 240_101, 203_532, 480_202),
    "5m": (139_520, 794_112, 582_245, 533_516, 2_911_225),
    "19m": (1_868_032, 2_636_032, 1_950_821, 1_853_452, 9_754_105),
    "48m": (7_860_224, 5_987_584, 4_790_117, 4_619_788, 23_950_585),
    "317m": (56_119_328, 28_102_688, 22_876_261, 22_487_052, 183_010_088),
}
# Other environments at 5m: (D, A).
TASKS = {
    (5, 1): 4_932_704, (3, 1): 4_932_192, (6, 2): 4_937_570, (9, 2): 4_938_338, (8, 2): 4_938_082,
    (17, 6): 4_958_826, (67, 21): 5_040_776, (223, 38): 5_159_082,
}  # fmt: skip


@pytest.mark.parametrize("size", SINGLE)
def test_single_task_presets_have_the_reference_counts(size):
    config = TDMPC2Config.from_size(size, obs_shape=(24,), action_dim=6)
    assert count(config) == SINGLE[size]
    params = abstract_params(TDMPC2WorldModel, config)
    names = ("encoder", "dynamics", "reward", "policy", "q")
    assert tuple(count_parameters(params[name]) for name in names) == PARTS[size]


@pytest.mark.parametrize("size", MT80)
def test_multitask_presets_have_the_reference_counts(size):
    assert count(TDMPC2Config.from_size(size, obs_shape=(39,), action_dim=6, num_tasks=80)) == MT80[size]
    of_mt30 = {"task_dim": 96 if size in ("1m", "317m") else 64} | ({"latent_dim": 512} if size == "19m" else {})
    assert count(TDMPC2Config.from_size(size, obs_shape=(24,), action_dim=6, num_tasks=30, **of_mt30)) == MT30[size]


def test_other_counts_of_the_reference():
    for (obs_dim, action_dim), expected in TASKS.items():
        assert count(TDMPC2Config.from_size("5m", obs_shape=(obs_dim,), action_dim=action_dim)) == expected
    for shape in ((9, 64, 64), (64, 64, 9)):
        assert count(TDMPC2Config.from_size("5m", obs_shape=shape, action_dim=6)) == 4_879_370
    episodic = TDMPC2Config.from_size("5m", obs_shape=(24,), action_dim=6, episodic=True)
    assert count(episodic) - SINGLE["5m"] == 527_873


# Side: convolutions, side of the last feature map.
FEATURES = {
    5: (1, 3), 7: (1, 5), 10: (1, 8), 11: (2, 3), 24: (2, 9), 25: (3, 3), 54: (3, 10), 55: (4, 3), 64: (4, 4),
    84: (4, 6), 96: (4, 8), 102: (4, 8), 103: (5, 3), 128: (5, 4), 198: (5, 8), 199: (6, 3), 256: (6, 4),
}  # fmt: skip


def test_pictures_of_any_side_are_counted():
    """Beside the reference's at 64 × 64: convolutions, then affine map and LayerNorm from their features to 512."""
    for side, (stages, last) in FEATURES.items():
        shape = (side, side, 3)
        assert (len(picture_convolutions(shape)), picture_features(shape)) == (stages, (last, last))
        params = encoder_params(TDMPC2Config.from_size("5m", obs_shape=shape, action_dim=6))
        kernels = [7, 5, 3, 3][-stages:] if stages <= 4 else [7, 5, *[3] * (stages - 2)]
        convolutions = sum(k * k * c * 32 + 32 for k, c in zip(kernels, [3] + [32] * 5, strict=False))
        features = 32 * last * last
        head = 0 if features == 512 else (features + 1) * 512 + 2 * 512
        assert count_parameters(params) == convolutions + head
    assert picture_features((3, 30, 200)) == (4, 46)


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 256), st.integers(5, 256), st.integers(1, 4), st.booleans())
def test_pictures_of_any_side_become_latents(height, width, channels, channels_first):
    shape = (channels, height, width) if channels_first else (height, width, channels)
    config = make(obs_shape=shape)
    least, _ = sorted(picture_features(shape))
    assert least >= 3

    def encode(key):
        encoder = make_encoder(config, jnp.dtype(jnp.float32), nnx.Rngs(0))
        return encoder(jnp.zeros((2, *shape), jnp.uint8), jnp.zeros((2, 0)), key)

    assert jax.eval_shape(encode, jax.random.key(0)).shape == (2, 512)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((3, 64, 64), (64, 64, 3, True)),
        ((64, 64, 3), (64, 64, 3, False)),
        ((7, 7, 20), (7, 7, 20, False)),
        ((20, 7, 7), (7, 7, 20, True)),
        ((64, 96, 1), (64, 96, 1, False)),
        ((9, 64, 96), (64, 96, 9, True)),
        ((5, 5, 5), (5, 5, 5, False)),
    ],
)
def test_channels_are_the_odd_axis_out(shape, layout):
    assert picture_layout(shape) == layout


def test_only_the_features_of_the_reference_are_the_latent():
    for side in (63, 64, 70):
        assert "head" not in encoder_params(make(obs_shape=(side, side, 3)))
    for fields in ({"obs_shape": (64, 64, 3), "latent_dim": 64}, {"obs_shape": (84, 84, 3)}):
        assert "head" in encoder_params(make(**fields))


def test_dicts_keep_their_order_and_round_trip():
    config = make(obs_shape={"b": [3], "cam": [9, 7, 3], "a": [2, 2]}, encoder_dim=16)
    assert (config.image_keys, config.vector_keys, config.vector_dim) == (("cam",), ("b", "a"), 7)
    again = TDMPC2Config(**json.loads(config.to_json()))
    assert again == config
    assert hash(again) == hash(config)
    assert config != config.replace(obs_shape={"a": [2, 2], "b": [3], "cam": [9, 7, 3]})
    params = encoder_params(config)
    # Convolution 3×3×3 → 5×7×32 → 16; vectors 7 → 16 → 16; joined, 32 → 512. Two numbers a unit for each LayerNorm.
    assert count_parameters(params["images"]) == 27 * 32 + 32 + (5 * 7 * 32 + 3) * 16
    assert count_parameters(params["mlp"]) == (7 + 3) * 16 + (16 + 3) * 16
    assert count_parameters(params["head"]) == (32 + 3) * 512


def test_plain_constructor_is_the_reference_5m():
    assert make() == TDMPC2Config.from_size("5m", obs_shape=(39,), action_dim=6)


def test_num_parameters_leaves_targets_and_statistics_out():
    model = TDMPC2WorldModel(TDMPC2Config.from_size("tiny", obs_shape=(3,), action_dim=1))
    assert model.num_parameters() == count(model.config)


@pytest.mark.parametrize(
    ("steps", "gamma"), [(500, 0.99), (100, 0.95), (200, 0.975), (1_000, 0.995), (100_000, 0.995), (1, 0.95)]
)
def test_discount_follows_from_the_episode_length(steps, gamma):
    assert make(episode_length=steps).discounts == (pytest.approx(gamma),)


def test_discount_per_task_and_given():
    config = make(num_tasks=3, episode_lengths=(500, 100, 200))
    assert config.discounts == pytest.approx((0.99, 0.95, 0.975))
    assert config.replace(discount=0.9).discounts == (0.9, 0.9, 0.9)


def test_iterations_follow_from_the_action_dimensions():
    assert [make(action_dim=n).planner_iterations for n in (1, 19, 20, 38)] == [6, 6, 8, 8]
    assert make(action_dim=38, iterations=3).planner_iterations == 3


def test_round_trip_through_json(tmp_path):
    config = make(num_tasks=2, action_dims=(6, 4), episode_lengths=(500, 100), discount_max=0.99)
    assert TDMPC2Config.from_dict(json.loads(config.to_json())) == config
    assert hash(TDMPC2Config(**json.loads(config.to_json()))) == hash(config)


def test_configs_of_the_earlier_library_load():
    old = {
        "model_type": "tdmpc2", "model_name": "5m", "obs_shape": [39], "action_dim": 6, "action_type": "continuous",
        "latent_type": "simnorm", "latent_dim": 256, "deter_dim": 256, "stoch_dim": 32, "dynamics_type": "mlp",
        "hidden_dim": 256, "learning_rate": 3e-4, "grad_clip": 100.0, "device": "cuda", "dtype": "float32",
        "simnorm_dim": 8, "num_hidden_layers": 3, "task_dim": 96, "num_tasks": 1, "num_q_networks": 4, "horizon": 5,
        "num_samples": 512, "num_elites": 64, "temperature": 0.5, "momentum": 0.1, "gamma": 0.98, "use_decoder": False,
    }  # fmt: skip
    with pytest.warns(UserWarning, match=r"deter_dim.*momentum.*use_decoder"):
        config = TDMPC2Config.from_dict(old)
    assert (config.num_q, config.mlp_layers, config.discounts, config.horizon) == (4, 3, (0.98,), 5)
    assert not config.multitask
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TDMPC2Config.from_dict({"obs_shape": [39], "action_dim": 6, "num_q_networks": 4})


def test_unknown_field_names_the_nearest():
    with pytest.raises(UnknownFieldError, match="latent_dim"):
        TDMPC2Config.from_dict({"obs_shape": [3], "action_dim": 1, "latent_dims": 64})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latent_dim": 100}, "simnorm_dim"),
        ({"num_q": 1}, "num_q"),
        ({"num_elites": 600}, "num_samples"),
        ({"num_pi_trajs": 512}, "num_samples"),
        ({"action_type": "both"}, "'continuous' or 'discrete'"),
        ({"precision": "float16"}, "bfloat16"),
        ({"model_type": "dreamerv3"}, "tdmpc2"),
        ({"obs_shape": (3, 4, 84)}, "sides 4 × 84; from 5 × 5 to 256 × 256.*image_size=64.*--image-size 64"),
        ({"obs_shape": (64, 257, 3)}, "sides 64 × 257"),
        ({"obs_shape": {"cam": (3, 3, 3)}}, r"obs_shape\['cam'\]=\(3, 3, 3\) has sides 3 × 3"),
        ({"obs_shape": (4, 4, 4, 4)}, "not a shape"),
        ({"obs_shape": (4, 4)}, "not a shape"),
        ({"obs_shape": {"a": (0,)}}, r"obs_shape\['a'\]"),
        ({"obs_shape": {}}, "obs_shape is empty"),
        ({"obs_shape": 24}, "not a shape"),
        ({"obs_shape": (9, 64, 64), "num_tasks": 2}, "vector"),
        ({"obs_shape": {"a": (3,), "cam": (9, 64, 64)}, "num_tasks": 2}, "vector"),
        ({"obs_shape": (9, 64, 64), "symlog_obs": True}, "vector"),
        ({"num_tasks": 2, "episodic": True}, "terminations"),
        ({"num_tasks": 2, "action_dims": (6,)}, "2 tasks"),
        ({"num_tasks": 2, "action_dims": (6, 7)}, "action_dim=6"),
        ({"num_tasks": 2, "task_dim": 0}, "task_dim"),
        ({"action_dims": (3,)}, "num_tasks"),
        ({"min_std": 3.0}, "max_std"),
        ({"horizon": 0}, "horizon"),
        ({"horizon": 2.5}, "horizon"),
        ({"discount": 1.5}, "discount"),
        ({"episodic": "yes"}, "episodic"),
        ({"vmin": 10.0}, "vmax"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        make(**fields)


def test_unknown_size_lists_the_known():
    with pytest.raises(ConfigError, match=r"Known: tiny, 1m, 5m, 19m, 48m, 317m"):
        TDMPC2Config.from_size("20m", obs_shape=(3,), action_dim=1)
