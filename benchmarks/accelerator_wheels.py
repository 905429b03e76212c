"""The wheels that a machine with a GPU and without a network needs, in the versions that are installed here.

With what that machine has, only what is missing there, and what is outside the versions that worldloom, or a package
that it would get, asks for. What is there and fits is left as it is, with all that it needs.
"""

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
LARGE = 20
"""Megabytes of an installed package from which its size is listed."""


def lines(have=None, python=None):
    """Lines of a requirements file: ``name==version``, or what is asked for where that is not installed here.

    Args:
      have: versions by name on that machine, see :func:`versions_in`; None lists everything.
      python: version of Python there, such as "3.12"; None is this one's.
    """
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    other = f"--python-version {python} " if python else ""
    yield f"# python -m pip download {other}--only-binary=:all: --dest WHEELS -r THIS_FILE"
    yield f"# for the system of this machine and {f'Python {python}' if python else 'the same Python'}; there:"
    yield "# python -m pip install --no-index --find-links WHEELS -r THIS_FILE && python -m pip check"
    groups = {
        "worldloom": project["dependencies"],
        "the tests of recorded values, and pictures of runs": ["pytest>=8", *extras["video"]],
        "environments": extras["envs"],
    }
    plan = Plan(have or {}, {"python_version": python, "python_full_version": f"{python}.0"} if python else {})
    texts = {}
    for group, requirements in groups.items():
        before = set(plan.wanted)
        for requirement in map(Requirement, requirements):
            plan.add(requirement)
        texts[group] = sorted(plan.wanted.keys() - before)
    yield from plugins(have or {}, plan)
    for group, names in texts.items():
        yield f"# {group}, and what that needs{'' if names else ': all there'}"
        yield from (plan.line(name) for name in names)


def plugins(have, plan):
    """The plugin of JAX for CUDA, of the version of the JAX that will be there."""
    jax = importlib.metadata.version("jax") if "jax" in plan.wanted else have["jax"]
    cuda = [version for version in (12, 13) if f"jax-cuda{version}-plugin" in have]
    # NVIDIA's libraries have the version of CUDA in their names up to 12.
    cuda = cuda or [12] * any(name.startswith("nvidia-") and name.endswith("-cu12") for name in have)
    for version in cuda or (12, 13):
        parts = [f"jax-cuda{version}-plugin", f"jax-cuda{version}-pjrt"]
        if all(have.get(name) == jax for name in parts):
            yield f"# accelerator with CUDA {version}: there, as JAX {jax} needs it"
            continue
        yield f"# accelerator with CUDA {version}; pip adds NVIDIA's libraries. Keep only the one that the driver runs"
        yield f"{parts[0]}[with-cuda]=={jax}"
        yield f"{parts[1]}=={jax}"


class Plan:
    """What has to be carried.

    Attributes:
      wanted: by name, what asks for a package that is missing there or does not fit.
    """

    def __init__(self, have, marker):
        self.wanted = {}
        self._have, self._marker, self._done = have, marker, set()

    def add(self, requirement):
        """Want a package, and all that it needs, unless what is there fits."""
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if name not in self.wanted and fits(self._have.get(name), requirement):
            return
        self.wanted.setdefault(name, requirement)
        if not fits(installed(name), requirement):
            self.wanted[name] = requirement
        if (name, extras) in self._done or installed(name) is None:
            return
        self._done.add((name, extras))
        for needed in map(Requirement, importlib.metadata.requires(name) or []):
            applies = needed.marker is None or any(
                needed.marker.evaluate({**self._marker, "extra": extra}) for extra in ("", *extras)
            )
            if applies:
                self.add(needed)

    def line(self, name):
        """The line of a wanted package, with why and how large in a comment."""
        requirement, here, there = self.wanted[name], installed(name), self._have.get(name)
        notes = [f"there: {there}"] if there else []
        if fits(here, requirement):
            size = sum(file.size or 0 for file in importlib.metadata.files(name) or []) / 1e6
            notes += [f"{size:.0f} MB installed"] if size > LARGE else []
            return "  # ".join([f"{name}=={here}", *[", ".join(notes)] * bool(notes)])
        notes.insert(0, f"here: {here or 'not installed'}")
        return f"{name}{requirement.specifier}  # {', '.join(notes)}"


def fits(version, requirement):
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def installed(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions_in(text):
    """Versions by name in the output of ``pip list --format=freeze`` or ``pip freeze``; other lines are passed over."""
    found = {}
    for line in text.splitlines():
        try:
            requirement = Requirement(line.strip())
        except InvalidRequirement:
            continue
        version = re.fullmatch(r"===?([^,]+)", str(requirement.specifier))
        if version:
            found[canonicalize_name(requirement.name)] = version[1]
    return found
