"""What the latent states of all families share: a short ``repr``, and errors that say how they are used."""

from __future__ import annotations

from typing import Any, Never

from worldloom.describe import ShortRepr

_FIELDS = {
    "deterministic": "deter",
    "stochastic": "stoch",
}
"""Fields of the earlier library's latent state, with their names here."""


class LatentBase(ShortRepr):
    """Base of the frozen dataclasses that hold a latent state."""

    def __getitem__(self, index: Any) -> Never:
        raise TypeError(
            f"A {type(self).__name__} is one tree of arrays whose first axes are time and batch, not a list; write "
            f"jax.tree.map(lambda x: x[{index!r}], states)."
        )

    def __getattr__(self, name: str) -> Never:
        fields = list(type(self).__dataclass_fields__)  # type: ignore[attr-defined]
        hint = ""
        if name in _FIELDS:
            here = [field for field in fields if field == _FIELDS[name] or len(fields) == 1]
            hint = f" It is called '{here[0]}' here." if here else f" This family's state has {', '.join(fields)}."
        elif name in ("to", "detach", "clone"):
            hint = " It is a tree of JAX arrays: jax.device_put moves it, jax.lax.stop_gradient cuts gradients."
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'.{hint}", name=name, obj=self)
