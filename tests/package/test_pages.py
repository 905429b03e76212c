"""Every page: its programs run as printed, on a smaller scale, and its links lead somewhere."""

import re
import sys
import unicodedata
from pathlib import Path

import pytest
import yaml

import worldloom

ROOT = Path(worldloom.__file__).parents[1]
DOCS = ROOT / "worldloom" / "docs"
SITE = DOCS / "site" / "mkdocs.yml"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
SMALLER = {
    "env_steps=10_000": "**SMALL",
    "env_steps=5_000": "**SMALL",
    "**training_fields, **SMALL": "**training_fields | SMALL",
    '("tdmpc2:tiny", **model_fields)': '("tdmpc2:tiny", **model_fields, horizon=1, iterations=1, num_q=2)',
    "held_out.sample(256, 16)": "held_out.sample(4, 6)",
    'trust.rows["kl"] ': 'trust.rows["q_disagreement"] ',
    '"tdmpc2:5m"': '"tdmpc2:tiny"',
    '"minari:pointmaze/umaze-v2"': '"episodes.npz"',
    '{"num_samples": 128, "iterations": 2}': '{"num_samples": 8}',
    "seeds=range(8)": "seeds=range(2)",
    '"tdmpc2:tiny", **model)': '"tdmpc2:tiny", **model, **PLANNER)',
    "TrainingConfig(**training, **SMALL)": "TrainingConfig(**training | SMALL)",
    "[1e-3, 3e-4]})": "[1e-3, 3e-4]}, model=PLANNER, **SMALL)",
}
"""Replacements in programs that would train for minutes."""
SMALL = {
    "env_steps": 60,
    "prefill": 40,
    "prefill_updates": 2,
    "batch_size": 4,
    "sequence_length": 2,
    "eval_interval": 0,
    "eval_at_end": False,
    "device": "cpu",
}
PLANNER = {"horizon": 1, "iterations": 1, "num_q": 2, "num_samples": 16, "num_elites": 4, "num_pi_trajs": 4}
"""Fields of a model that plans little."""
EXECUTED = (
    "quickstart",
    "concepts",
    "choose_a_model",
    "own_environment",
    "callbacks",
    "migration",
    "data",
    "imagined",
    "scaling",
    "weights",
    "acting",
    "jax_environments",
)
"""Pages whose programs run here, one after another in one namespace. Other pages have tests of their own."""
BEFORE = {
    "acting": """
import sys, jax, numpy as np
from worldloom import Trainer, TrainingConfig, create_world_model
from worldloom.envs import make_env
from worldloom.training import RunFolder, recipe
with make_env("Pendulum-v1") as training_env:
    fields, training, _ = recipe("tdmpc2:tiny", training_env)
    model = create_world_model("tdmpc2:tiny", **fields | PLANNER)
    config = TrainingConfig(**training | SMALL)
    Trainer(model, config, RunFolder("runs/pendulum").callbacks(progress=False)).train(training_env)
from worldloom.cli import main
assert main(["export", "runs/pendulum", "--to", "policy.worldloom", "--with-reader", "--platforms=cpu"]) == 0
sys.path.insert(0, ".")
actions = np.zeros((5, 1, 1), np.float32)
""",
    "data": """
import numpy as np
from worldloom.replay import ReplayBuffer, ReplayStore
from worldloom import Trainer, TrainingConfig, create_world_model
buffer = ReplayBuffer()
for _ in range(4):
    buffer.add_episode(np.zeros((11, 2)), np.zeros((10, 1)), np.zeros(10), truncated=True)
buffer.save("episodes.npz")
model = create_world_model("tdmpc2:tiny", obs_shape=(2,), action_dim=1, horizon=1, iterations=1, num_q=2)
config = TrainingConfig(total_steps=1, batch_size=2, sequence_length=2, device="cpu")
""",
    "weights": """
from worldloom import create_world_model
create_world_model("tdmpc2:tiny", obs_shape=(24,), action_dim=6).save_pretrained("runs/walker")
mt30 = create_world_model("tdmpc2:tiny", obs_shape=(30,), action_dim=6, num_tasks=30, task_dim=64)
""",
    "imagined": """
import jax, numpy as np
from worldloom import ReplayBuffer, create_world_model
replay = held_out = ReplayBuffer()
for _ in range(3):
    replay.add_episode(np.zeros((13, 2), np.float32), np.zeros((12, 1), np.float32), np.zeros(12), truncated=True)
model = create_world_model("tdmpc2:tiny", obs_shape=(2,), action_dim=1)
key, actions = jax.random.key(0), np.zeros((64, 1), np.float32)
""",
}
"""What the text of a page takes as given."""
OWN_TESTS = {
    "configuration": "tests/package/test_configs.py",
    "contributing": "tests/package/test_contributing.py",
    "online": "tests/cli/test_online_page.py",
    "planning": "tests/planning/test_planning_models.py",
    "protocols": "tests/training/test_protocols.py",
}


def programs(page):
    """The fenced Python programs of a page, also those within lists."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return [
        "\n".join(line.removeprefix(indent) for line in body.splitlines())
        for indent, body in re.findall(r"^( *)```python\n(.*?)^ *```$", text, flags=re.S | re.M)
    ]


@pytest.mark.parametrize("page", EXECUTED)
def test_programs_run_one_after_another(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setenv("WORLDLOOM_CACHE_DIR", str(tmp_path / "cache"))
    namespace: dict = {"SMALL": SMALL, "PLANNER": PLANNER}
    exec(BEFORE.get(page, ""), namespace)
    assert programs(page)
    for number, text in enumerate(programs(page)):
        for long, short in SMALLER.items():
            text = text.replace(long, short)
        exec(compile(text, f"{page}.md, program {number}", "exec"), namespace)


def test_every_page_with_programs_is_executed():
    written = {page.removesuffix(".md") for page in PAGES if "```python" in (DOCS / page).read_text(encoding="utf-8")}
    assert written - {*EXECUTED, *OWN_TESTS} <= set(), "add the page to EXECUTED, or name its test"
    for page, test in OWN_TESTS.items():
        assert f"{page}.md" in (ROOT / test).read_text(encoding="utf-8") or page in (ROOT / test).read_text("utf-8")


def anchor(heading):
    """The address of a heading within its page, as on the site and in the repository."""
    heading = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


@pytest.mark.parametrize("page", [*PAGES, "../../README.md", "../CHANGELOG.md", "../../benchmarks/README.md"])
def test_links_and_anchors_lead_somewhere(page):
    path = DOCS / page
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text):
        file, _, fragment = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if fragment:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.M)
            assert fragment in {anchor(heading) for heading in headings}, link


def site_entries(value):
    """Files in the navigation of the site."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [file for part in parts for file in site_entries(part)]


def test_every_page_is_in_the_navigation_once():
    entries = site_entries(yaml.safe_load(SITE.read_text(encoding="utf-8"))["nav"])
    assert len(entries) == len({*entries})
    missing = {*PAGES} - {*entries}
    assert not missing
    assert {*entries} - {*PAGES} == {"changes.md"}  # Made from the changelog when the site is built.


def test_all_names_of_the_reference_exist():
    for page in (DOCS / "api").glob("*.md"):
        names = re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), flags=re.M)
        assert names
        for name in names:
            module, _, attribute = name.rpartition(".")
            assert hasattr(__import__(module, fromlist=["_"]), attribute), name


def test_the_migration_page_has_every_earlier_name():
    from worldloom.migration import MODELS, PUBLIC_NAMES

    text = (DOCS / "migration.md").read_text(encoding="utf-8")
    missing = [name for name in (*PUBLIC_NAMES, *MODELS) if not re.search(rf"\b{name}\b", text)]
    assert not missing
