"""Model cards: the ``README.md`` of a saved model, with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

CARD_FILE = "README.md"


@dataclasses.dataclass(frozen=True)
class Result:
    """Returns of an evaluation.

    Attributes:
      env: environment.
      mean: mean return.
      std: standard deviation over episodes.
      steps: environment steps of training before it.
      episodes: number of episodes; None if it is not known.
    """

    env: str
    mean: float
    std: float
    steps: int
    episodes: int | None = None


@dataclasses.dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
      name: of the repository or the model.
      config: the model's config, as JSON values.
      parameters: number of trained parameters.
      licence: identifier of the licence of the weights, such as ``"apache-2.0"``.
      env: environment or data that it was trained in; None if not known.
      results: evaluations.
      training: settings of the training run, as JSON values; empty if not known.
      protocol: published experiment, and what was changed of it; None without one.
      versions: versions of packages and device.
      pictures: {title: name of a file beside the card}.
    """

    name: str
    config: Mapping[str, Any]
    parameters: int
    licence: str = "apache-2.0"
    env: str | None = None
    results: Sequence[Result] = ()
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    protocol: Mapping[str, Any] | None = None
    versions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pictures: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def metadata(self) -> dict[str, Any]:
        """The front matter as JSON values: library, tags, licence, and results in the hub's model-index form."""
        kind = str(self.config.get("model_type"))
        tags = ["reinforcement-learning", "world-model", "jax", "flax", kind]
        found: dict[str, Any] = {
            "library_name": "worldloom",
            "pipeline_tag": "reinforcement-learning",
            "license": self.licence,
            "tags": tags + ([self.env] if self.env else []),
        }
        if self.results:
            results = [
                {
                    "task": {"type": "reinforcement-learning", "name": "reinforcement-learning"},
                    "dataset": {"name": each.env, "type": each.env},
                    "metrics": [
                        {
                            "type": "mean_reward",
                            "name": "mean_reward",
                            "value": f"{each.mean:.2f} +/- {each.std:.2f}",
                            "verified": False,
                        }
                    ],
                }
                for each in self.results
            ]
            found["model-index"] = [{"name": self.name.rpartition("/")[2], "results": results}]
        return found

    def text(self) -> str:
        """The card, Markdown with its front matter."""
        # JSON values are YAML too, and cannot be misread as something else.
        front = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in self.metadata().items())
        return f"---\n{front}\n---\n\n" + "\n\n".join([*self._body()]) + "\n"

    def _body(self) -> list[str]:
        where = f", trained in {_code(self.env)}" if self.env else ""
        kind, name = _code(str(self.config.get("model_type"))), self.name
        code = [
            "from worldloom import create_world_model, load_policy",
            "",
            f"model = create_world_model({json.dumps(name)})",
            f"agent = load_policy({json.dumps(name)})",
        ]
        parts = [
            f"# {_plain(name)}",
            f"A {kind} world model with {self.parameters:,} parameters{where}, made with worldloom.",
            "\n".join(["```python", *code, "```"]),
        ]
        if self.results:
            rows = [
                f"| {_code(each.env)} | {each.mean:.1f} ± {each.std:.1f} | {each.episodes or '?'} | {each.steps:,} |"
                for each in self.results
            ]
            head = "| environment | return | episodes | environment steps |\n|---|---|---|---|"
            parts.append("\n".join(["## Results\n", head, *rows]))
        parts += [f"![{_plain(title)}]({file})" for title, file in self.pictures.items()]
        if self.protocol:
            changed = self.protocol.get("changed") or {}
            told = "; ".join(f"{_plain(str(name))} {old} → {new}" for name, (old, new) in changed.items())
            followed = "changed: " + told if changed else "as published"
            parts.append(f"Published experiment {_code(str(self.protocol.get('name')))}, {followed}.")
        for title, values in (("Training", self.training), ("Model", self.config), ("Versions", self.versions)):
            if values:
                block = json.dumps(dict(values), indent=2, ensure_ascii=False)
                parts.append(f"## {title}\n\n```json\n{block}\n```")
        return parts


def _plain(text: str) -> str:
    """``text`` on one line, without what Markdown or HTML would read as markup."""
    return "".join(" " if c.isspace() else f"\\{c}" if c in "\\`*_[]<>|#!" else c for c in text)[:200]


def _code(text: str) -> str:
    return "`" + "".join(" " if c.isspace() else c for c in text.replace("`", "'").replace("|", "¦"))[:200] + "`"
