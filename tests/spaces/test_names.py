"""Names of observations and actions: any text, in names of weights and files."""

import re

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom.interop import load_official_dreamerv3, to_official_dreamerv3
from worldloom.models.dreamer import DreamerV3Config, DreamerV3WorldModel
from worldloom.spaces import attribute_name, name_of_attribute

ODD = [
    "robot/arm",
    "a.b",
    "__class__",
    "items",
    "0",
    "a b",
    "höhe",
    "%2F",
    "~",
    "_pytree__state",
    "../x",
    "a\n",
    "__dict__",
]
names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1) | st.sampled_from(ODD)


@settings(deadline=None)
@given(name=names)
def test_every_name_has_a_form_for_attributes_and_files(name):
    attribute = attribute_name(name)
    assert name_of_attribute(attribute) == name
    assert re.fullmatch(r"[A-Za-z_%][A-Za-z0-9_%-]*", attribute)
    assert not hasattr(nnx.Dict(), attribute) or attribute == name


@settings(deadline=None)
@given(name=st.from_regex(r"[A-Za-z][A-Za-z0-9_-]*", fullmatch=True))
def test_plain_names_stay_as_they_are(name):
    assert attribute_name(name) == name or name == "items"


@pytest.mark.parametrize("name", ODD)
def test_containers_of_modules_take_the_form(name):
    module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    container = nnx.Dict({attribute_name(name): module, "other": nnx.Linear(2, 3, rngs=nnx.Rngs(1))})
    graph, state = nnx.split(container)
    assert sorted(name_of_attribute(key) for key, _ in nnx.merge(graph, state).items()) == sorted([name, "other"])


def test_odd_names_reach_weights_files_and_the_official_program(tmp_path):
    config = DreamerV3Config.from_size(
        "tiny",
        obs_shape=dict.fromkeys(ODD, (2,)),
        action_dim=dict.fromkeys(ODD, 2),
        action_type={name: "discrete" if i % 2 else "continuous" for i, name in enumerate(ODD)},
        deter_dim=16,
        blocks=2,
        stoch_dim=64,
        num_categories=2,
        hidden_dim=8,
        mlp_layers=1,
        bins=5,
    )
    assert DreamerV3Config.from_dict(config.to_dict()) == config
    model = DreamerV3WorldModel(config, seed=1, device="cpu")
    again = DreamerV3WorldModel.from_pretrained(model.save_pretrained(tmp_path / "model"))
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
    official = to_official_dreamerv3(model)
    assert {f"dec/vec/{name}/pred/kernel" for name in ODD} <= official.keys()
    assert "pol/head/robot/arm/mean/kernel" in official
    shapes = {"obs_shape": config.obs_shape, "action_dim": config.action_dim, "action_type": config.action_type}
    loaded = load_official_dreamerv3(official, **shapes, num_categories=2)
    jax.tree.map(np.testing.assert_array_equal, model.params, loaded.params)
