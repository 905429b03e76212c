"""A page about a run: curve, video, imagination, settings and versions in one HTML file that needs no network."""

from __future__ import annotations

import base64
import datetime
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from worldloom.config import read_json_object
from worldloom.files import write_atomically
from worldloom.report.curves import Record, read_records

SUMMARY_FILE = "summary.html"

_PICTURES = (
    ("learning_curve.png", "Learning curve", "Return of an episode, or loss, as training goes on."),
    ("eval.gif", "What it does", "The first episode of the latest evaluation."),
    (
        "open_loop*.png",
        "What it imagines",
        "The model observes the first steps of recorded episodes; then it predicts the rest from the actions alone.",
    ),
    (
        "horizon.png",
        "What it imagines",
        "How far rewards, values and latents are off after 1 to 15 imagined steps, beside a guess without change.",
    ),
    (
        "trust.png",
        "How far to believe it",
        "The model's own signal of doubt in recorded sequences, and its errors by the number of imagined steps.",
    ),
)
"""Files of a run folder, with a title and a sentence; those that are not there are left out."""
_TYPES = {".png": "image/png", ".gif": "image/gif"}

_STYLE = """
:root { color-scheme: light; font: 16px/1.5 system-ui, sans-serif; color: #1d2733; background: #f5f6f8 }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 3rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 } h2 { font-size: 1.1rem; margin: 0 }
header p, figcaption { color: #5a6675; margin: .2rem 0 0 }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1.25rem 0 }
.numbers div, figure, details { background: #fff; border: 1px solid #e1e5ea; border-radius: 8px; padding: .8rem 1rem }
.numbers b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums }
.numbers span { color: #5a6675; font-size: .85rem }
figure { margin: 0 0 1rem }
.scroll { overflow-x: auto }
img.plot { min-width: 34rem }
figure img { display: block; height: auto; margin: .8rem auto 0 }
img.pixels { image-rendering: pixelated; max-width: 100%; min-width: min(20rem, 100%) }
@media (min-width: 40rem) { img.plot { max-width: 100% } }
details { margin: 0 0 1rem } summary { cursor: pointer; font-weight: 600 }
table { border-collapse: collapse; width: 100%; font-size: .9rem; margin-top: .5rem }
td { border-top: 1px solid #eceff3; padding: .25rem .75rem .25rem 0; vertical-align: top }
td:first-child { color: #5a6675; width: 38% } code { font-size: .9em }
"""


def write_summary(folder: str | Path) -> Path:
    """Write ``summary.html`` into the folder of a run, from the other files there, and return its path.

    Pictures are embedded; files that are missing or damaged are left out. Any text of the files is escaped.
    """
    folder = Path(folder)
    settings, starts = _read_object(folder / "config.json"), _read_starts(folder / "versions.json")
    metrics = folder / "metrics.jsonl"
    records = read_records(metrics) if metrics.is_file() else []
    model, env = settings.get("model") or {}, settings.get("env") or {}
    source = env.get("spec") or env.get("made_of") or "recorded episodes"
    title = f"{model.get('model_type', 'a world model')} on {source}"
    written = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    newest = starts[-1] if starts else {}
    body = [
        f"<header><h1>{_text(title)}</h1><p>{_text(folder.absolute().name)} · written {written}</p></header>",
        f'<div class="numbers">{"".join(_numbers(records, newest))}</div>',
        *_figures(folder),
        _table("Training", settings.get("training") or {}),
        _table("Model", model),
        _table("Environment", {**env, **(settings.get("env_defaults") or {})}),
        _table("Versions and machine", _versions(newest)),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    write_atomically(folder / SUMMARY_FILE, page)
    return folder / SUMMARY_FILE


def _numbers(records: Sequence[Record], start: Mapping[str, Any]) -> Iterable[str]:
    """The tiles at the top: how far the run is, and how good."""
    last = records[-1] if records else {}
    if last.get("env_steps"):
        yield _tile(f"{last['env_steps']:,}", "environment steps")
    yield _tile(f"{last.get('step', 0):,}", "updates")
    evaluations = [record for record in records if isinstance(record.get("eval/return"), int | float)]
    if evaluations:
        newest, best = evaluations[-1], max(evaluations, key=lambda record: record["eval/return"])
        spread = newest.get("eval/return_std")
        spread = f" ± {spread:.4g}" if isinstance(spread, int | float) else ""
        yield _tile(f"{newest['eval/return']:.4g}{spread}", "return, latest evaluation (± std)")
        yield _tile(f"{best['eval/return']:.4g}", f"return, best evaluation (update {best['step']:,})")
    losses = [record for record in records if isinstance(record.get("eval/loss"), int | float)]
    if losses:
        yield _tile(f"{losses[-1]['eval/loss']:.4g}", "loss on held-out episodes")
    if start.get("device"):
        kind, _, platform = str(start["device"]).partition(" (")
        yield _tile(kind if f"{kind})" == platform else str(start["device"]), "device")


def _tile(value: str, label: str) -> str:
    return f"<div><b>{_text(value)}</b><span>{_text(label)}</span></div>"


def _figures(folder: Path) -> Iterable[str]:
    for pattern, title, sentence in _PICTURES:
        paths = sorted(folder.glob(pattern))
        if not paths:
            continue
        pictures = "".join(_picture(path, f"{title}: {path.name}") for path in paths)
        yield f"<figure><h2>{_text(title)}</h2><figcaption>{_text(sentence)}</figcaption>{pictures}</figure>"


def _picture(path: Path, description: str) -> str:
    """The file as an image element. Small frames of videos keep their pixels when enlarged; plots scroll on phones."""
    kind = "pixels" if path.suffix == ".gif" else "plot"
    data = base64.b64encode(path.read_bytes()).decode()
    source = f"data:{_TYPES[path.suffix]};base64,{data}"
    return f'<div class="scroll"><img class="{kind}" alt="{_text(description)}" src="{source}"></div>'


def _table(title: str, values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{_text(name)}</td><td><code>{_text(_shown(value))}</code></td></tr>" for name, value in values.items()
    )
    return f"<details><summary>{_text(title)}</summary><table>{rows}</table></details>"


def _versions(start: Mapping[str, Any]) -> dict[str, Any]:
    """One flat table of the newest start."""
    command, packages = start.get("command"), start.get("packages")
    flat = {name: value for name, value in start.items() if name not in ("command", "packages") and value is not None}
    if isinstance(command, list):
        flat["command"] = " ".join(map(str, command))
    return flat | (dict(packages) if isinstance(packages, Mapping) else {})


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except (OSError, ValueError):
        return {}


def _read_starts(path: Path) -> list[dict[str, Any]]:
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []
