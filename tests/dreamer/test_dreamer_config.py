"""DreamerV3Config: sizes counted to the last parameter, and which values are refused."""

import warnings
from itertools import pairwise

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from worldloom.errors import ConfigError, UnknownFieldError
from worldloom.models.compilation import abstract_params
from worldloom.models.dreamer import DreamerV3Config, DreamerV3WorldModel
from worldloom.models.dreamer.networks import Decoder, Encoder
from worldloom.models.params import count_parameters

PARTS = ("rssm", "encoder", "decoder", "reward", "continuation", "actor", "critic")
# Parameters of the reference program with every preset: total, then the parts in the order above.
IMAGE_CONTINUOUS = {
    "size1m": (686_846, 376_704, 14_304, 80_595, 57_663, 41_153, 50_316, 66_111),
    "size12m": (10_494_158, 5_979_648, 220_416, 1_272_003, 721_407, 656_129, 791_052, 853_503),
    "size25m": (23_489_326, 13_442_304, 493_824, 2_857_635, 1_573_503, 1_475_713, 1_776_396, 1_869_951),
    "size50m": (41_650_062, 23_886_848, 876_032, 5_076_355, 2_753_279, 2_622_977, 3_154_956, 3_279_615),
    "size100m": (93_468_238, 53_721_600, 1_966_848, 11_413_059, 6_095_871, 5_900_545, 7_091_724, 7_278_591),
    "size200m": (165_948_686, 95_483_904, 3_492_864, 20_282_115, 10_749_183, 10_488_833, 12_601_356, 12_850_431),
    "size400m": (372_896_398, 214_791_168, 7_850_496, 45_617_283, 23_987_967, 23_597_569, 28_339_212, 28_712_703),
}
VECTOR_CONTINUOUS = {
    "size1m": (640_867, 364_416, 10_112, 51_096),
    "size12m": (9_738_019, 5_783_040, 138_752, 794_136),
    "size25m": (21_782_947, 12_999_936, 306_432, 1_781_016),
    "size50m": (38_612_003, 23_100_416, 539_648, 3_161_112),
    "size100m": (86_622_499, 51_952_128, 1_202_688, 7_100_952),
    "size200m": (153_769_507, 92_338_176, 2_127_872, 12_613_656),
    "size400m": (345_473_059, 207_713_280, 4_764_672, 28_357_656),
}
IMAGE_DISCRETE = {
    "size1m": 688_004,
    "size12m": 10_498_772,
    "size25m": 23_496_244,
    "size50m": 41_659_284,
    "size100m": 93_482_068,
    "size200m": 165_967_124,
    "size400m": 372_924_052,
}


def counts(size, **config):
    params = abstract_params(DreamerV3WorldModel, DreamerV3Config.from_size(size, **config))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    parts = tuple(count_parameters(params[name]) for name in PARTS)
    return (sum(parts), *parts)


@pytest.mark.parametrize("size", IMAGE_CONTINUOUS)
def test_presets_have_the_reference_parameter_counts(size):
    image = counts(size, obs_shape=(64, 64, 3), action_dim=6)
    assert image == IMAGE_CONTINUOUS[size]
    assert counts(size, obs_shape=(24,), action_dim=6) == VECTOR_CONTINUOUS[size] + image[4:]
    assert counts(size, obs_shape=(3, 64, 64), action_dim=18, action_type="discrete")[0] == IMAGE_DISCRETE[size]


# Side: channels of the levels in units of ``cnn_depth``, and the side that images are padded to.
LEVELS = {
    5: ((4,), 6), 7: ((4,), 8), 11: ((4,), 12), 12: ((4, 4), 12), 23: ((4, 4), 24), 24: ((3, 4, 4), 24),
    47: ((3, 4, 4), 48), 48: ((2, 3, 4, 4), 48), 64: ((2, 3, 4, 4), 64), 84: ((2, 3, 4, 4), 96),
    96: ((2, 3, 4, 4), 96), 255: ((2, 3, 4, 4), 256), 256: ((2, 3, 4, 4), 256),
}  # fmt: skip


def image_networks(config):
    """Shapes of the weights of encoder and decoder alone, which take a fraction of the model's time."""
    build = lambda: nnx.Dict(  # noqa: E731
        encoder=Encoder(config, jnp.dtype(jnp.float32), rngs=nnx.Rngs(0)), decoder=Decoder(config, rngs=nnx.Rngs(0))
    )
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(build)))


def test_pictures_of_any_side_are_counted():
    depth = 16
    for side, (multiples, padded) in LEVELS.items():
        config = DreamerV3Config.from_size("size12m", obs_shape=(side, side, 3), action_dim=6)
        channels = tuple(depth * multiple for multiple in multiples)
        assert (config.image_channels, config.padded_sides) == (channels, (padded, padded))
        params = image_networks(config)
        # Encoder: 5×5 convolutions with bias and norm. Decoder: the same backwards, from a map that is made of h (in
        # 8 blocks) and of z (512 numbers, through 512 hidden units).
        down = sum(25 * a * b + 2 * b for a, b in pairwise((3, *channels)))
        assert count_parameters(params["encoder"]) == down
        size = (padded // 2 ** len(channels)) ** 2 * channels[-1]
        up = sum(25 * a * b + 2 * b for a, b in pairwise(channels[::-1])) + 25 * channels[0] * 3 + 3 + channels[-1]
        from_latent = (2048 // 8 + 1) * size + (512 + 2) * 512 + (512 + 1) * size
        assert count_parameters(params["decoder"]) == from_latent + up


def test_num_parameters_leaves_out_slow_critic_and_statistics():
    model = DreamerV3WorldModel(DreamerV3Config.from_size("size1m", obs_shape=(24,), action_dim=6))
    assert model.num_parameters() == 640_867


def test_presets_keep_the_kl_settings():
    config = DreamerV3Config.from_size("size50m", obs_shape=(3, 64, 64), action_dim=18, kl_free=0.5)
    assert (config.kl_balance, config.kl_free, config.mlp_layers, config.cnn_depth) == (0.8, 0.5, 3, 32)


def test_derived_sizes():
    config = DreamerV3Config(obs_shape=(3, 64, 64), action_dim=18)
    assert (config.num_latents, config.feature_dim, config.width) == (32, 3072, 640)
    assert config.image_layout("obs") == (64, 64, 3, True)
    assert DreamerV3Config(obs_shape=(64, 96, 1), action_dim=2).image_layout("obs") == (64, 96, 1, False)


def test_several_observations_and_actions():
    config = DreamerV3Config(
        obs_shape={"pixels": [64, 64, 3], "joints": [7], "touch": []},
        action_dim={"move": 3, "grip": 2},
        action_type={"move": "continuous", "grip": "discrete"},
        cnn_depth=8,
    )
    assert config.image_keys == ("pixels",)
    assert config.vector_keys == ("joints", "touch")
    assert config.action_width == 5
    assert config.actions["grip"].discrete
    assert not config.actions["move"].discrete
    assert DreamerV3Config.from_dict(config.to_dict()) == config
    assert hash(config) == hash(DreamerV3Config.from_dict(config.to_dict()))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"deter_dim": 100}, "multiple of blocks=8"),
        ({"stoch_dim": 100}, "multiple of num_categories=32"),
        ({"obs_shape": (3, 4, 64)}, "sides 4 × 64; from 5 × 5 to 256 × 256.*image_size=64.*--image-size 64"),
        ({"obs_shape": (3, 257, 64)}, "sides 257 × 64"),
        ({"obs_shape": (2, 3, 64, 64)}, "vector like"),
        ({"obs_shape": "pixels"}, "vector like"),
        ({"obs_shape": {"a": (64, 64, 3), "b": (48, 48, 3)}}, "same sides.*--image-size"),
        ({"obs_shape": {"": (3,)}}, "empty text"),
        ({"action_dim": {"": 3}}, "empty text"),
        ({"obs_shape": {"\ud800": (3,)}}, "cannot be written"),
        ({"obs_shape": {}}, "obs_shape is empty"),
        ({"obs_shape": ()}, "obs_shape is empty"),
        ({"obs_shape": 24}, "vector like"),
        ({"obs_shape": (3, 64, 64), "cnn_depth": 3}, "to decode images"),
        ({"action_dim": 0}, "integer ≥ 1"),
        ({"action_dim": {"a": 2}, "action_type": {"b": "discrete"}}, "must name the actions"),
        ({"action_type": "both"}, "'continuous' or 'discrete'"),
        ({"bins": 254}, "odd"),
        ({"unimix": 1.0}, "below 1"),
        ({"kl_balance": 1.5}, "from 0 to 1"),
        ({"kl_free": -1.0}, "≥ 0"),
        ({"kl_free": float("nan")}, "≥ 0"),
        ({"min_std": 2.0}, "min_std ≤ max_std"),
        ({"return_horizon": 1}, "more than 1 step"),
        ({"mlp_layers": 2.5}, "integer ≥ 1"),
        ({"precision": "float16"}, "'bfloat16'"),
        ({"replay_context": 2}, "True or False"),
        ({"model_type": "tdmpc2"}, "'dreamerv3'"),
    ],
)
def test_bad_values_are_refused_with_a_sentence(values, words):
    with pytest.raises(ConfigError, match=words):
        DreamerV3Config(**{"obs_shape": (24,), "action_dim": 6, **values})


def test_unknown_field_names_the_nearest():
    with pytest.raises(UnknownFieldError, match="'deter_dim'"):
        DreamerV3Config(obs_shape=(24,), action_dim=6, deter_dims=512)
    with pytest.raises(ConfigError, match="size12m"):
        DreamerV3Config.from_size("size13m", obs_shape=(24,), action_dim=6)


def test_configs_of_the_earlier_library_load():
    earlier = {
        "model_type": "dreamer",
        "obs_shape": [3, 64, 64],
        "action_dim": 4,
        "stoch_discrete": 24,
        "stoch_classes": 16,
        "num_hidden_layers": 3,
        "deter_dim": 512,
        "encoder_type": "cnn",
    }
    with pytest.warns(UserWarning, match="encoder_type"):
        config = DreamerV3Config.from_dict(earlier)
    assert (config.stoch_dim, config.num_categories, config.num_latents, config.mlp_layers) == (384, 16, 24, 3)
    assert config.model_type == "dreamerv3"
    del earlier["encoder_type"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DreamerV3Config.from_dict(earlier) == config
    with pytest.raises(UnknownFieldError):
        DreamerV3Config.from_dict({"model_type": "dreamerv3", "obs_shape": [4], "action_dim": 2, "encoder_type": "cnn"})
