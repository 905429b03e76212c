"""Names of the earlier PyTorch library, and what replaces each: errors about an unknown name say the new one.

Nothing here makes an old name work. The page "Migration" lists the same names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_STATES = "Each family has its own latent state, a pytree of arrays: model.encode(obs) returns one."
_LATENT_SPACE = "Latents are part of each family: DreamerV3Config.num_categories, TDMPC2Config.simnorm_dim."

PUBLIC_NAMES: Mapping[str, str] = {
    "AutoConfig": "worldloom.get_config(name, obs_shape=…, action_dim=…) returns the config of a preset.",
    "AutoWorldModel": "worldloom.create_world_model(name_or_path, …) creates presets and loads saved models.",
    "CategoricalLatentSpace": _LATENT_SPACE,
    "ConfigRegistry": "worldloom.register_family registers a family of your own; get_config finds configs by name.",
    "DynamicsType": "The family decides it: DreamerV3Config is recurrent, TDMPC2Config an MLP.",
    "GaussianLatentSpace": _LATENT_SPACE,
    "LatentSpace": _LATENT_SPACE,
    "LatentState": _STATES,
    "LatentType": "The family decides it: DreamerV3Config has categorical latents, TDMPC2Config simplices.",
    "MODEL_ALIASES": "Presets have one name each, see worldloom.list_models().",
    "MODEL_CATALOG": "worldloom.list_models(verbose=True) returns it.",
    "SimNormLatentSpace": _LATENT_SPACE,
    "TrainingState": "It is worldloom.training.TrainState.",
    "Trajectory": "model.imagine(state, actions) returns one: states, rewards and continues, time first.",
    "WorldModelConfig": "Each family has its own: DreamerV3Config and TDMPC2Config; get_config finds them by name.",
    "WorldModelRegistry": "worldloom.register_family registers a family; create_world_model finds models by name.",
    "create_random_buffer": (
        "worldloom.training.collect(model, env, env_steps) returns a ReplayBuffer of an environment's episodes; "
        "ReplayBuffer.add_episode takes any other, random ones too."
    ),
    "create_trainer": "It is worldloom.training.Trainer(model, config, callbacks).",
    "load_buffer": "It is worldloom.training.ReplayBuffer.load(path).",
}
"""Names in the modules of the earlier library, with a sentence about the replacement."""

MODELS: Mapping[str, str] = {
    "dreamer-small": "dreamerv3:size12m",
    "dreamer-medium": "dreamerv3:size50m",
    "dreamer-large": "dreamerv3:size200m",
    "tdmpc": "tdmpc2:5m",
    "tdmpc-small": "tdmpc2:5m",
    "tdmpc-medium": "tdmpc2:48m",
    "tdmpc-large": "tdmpc2:317m",
}
"""Aliases of models in the earlier library, with the presets that they stood for."""

_FIELDS: Mapping[str, tuple[str, ...]] = {
    "free_nats": ("kl_free",),
    "gamma": ("discount", "return_horizon"),
    "lr": ("learning_rate",),
    "max_grad_norm": ("grad_clip",),
    "max_steps": ("total_steps",),
    "num_hidden_layers": ("mlp_layers",),
    "num_q_networks": ("num_q",),
    "seq_len": ("sequence_length",),
    "seq_length": ("sequence_length",),
    "stoch_classes": ("num_categories",),
    "stoch_discrete": ("stoch_dim",),
}
"""Fields and arguments of the earlier library and of other programs: what they may be called here."""

_TRAINING_FIELDS = (
    "batch_size",
    "device",
    "grad_clip",
    "learning_rate",
    "sequence_length",
    "total_steps",
    "warmup_steps",
)
"""Fields of ``TrainingConfig`` that configs of models had in the earlier library, or that are looked for there."""


def renamed(name: str, known: Iterable[str]) -> str | None:
    """The name among ``known`` that replaces ``name``, or that differs from it only in case; None if there is none.

    Words may be joined by ``-`` or ``_`` and flags begin with ``--``: ``--seq-len`` becomes ``--sequence-length``.
    """
    by_word = {_word(each): each for each in reversed(list(known))}
    candidates = [_word(name), *_FIELDS.get(_word(name), ()), MODELS.get(name.lower(), "")]
    return next((by_word[_word(each)] for each in candidates if each and _word(each) in by_word), None)


def _word(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()


def field_of_training(name: str, known: Iterable[str]) -> str | None:
    """The field of ``TrainingConfig`` that is meant by ``name``, which is no field of a config with ``known`` ones."""
    fields = (name.lower(), *_FIELDS.get(name.lower(), ()))
    return next((field for field in fields if field in _TRAINING_FIELDS and "total_steps" not in known), None)
