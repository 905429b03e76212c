"""The wheels that a machine with a GPU and without a network needs, in the versions that are installed here."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def lines():
    """Lines of a requirements file: ``name==version``, or what worldloom asks for where that is not installed here."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    jax = importlib.metadata.version("jax")
    yield "# With the same Python and system: python -m pip download --only-binary=:all: --dest WHEELS -r THIS_FILE"
    for cuda in (12, 13):
        yield f"# accelerator with CUDA {cuda}; pip adds NVIDIA's libraries. Keep only the one that the driver runs"
        yield f"jax-cuda{cuda}-plugin[with-cuda]=={jax}"
        yield f"jax-cuda{cuda}-pjrt=={jax}"
    groups = {
        "worldloom": project["dependencies"],
        "the tests of recorded values, and pictures of runs": ["pytest>=8", *extras["video"]],
        "environments": extras["envs"],
    }
    listed = set()
    for group, texts in groups.items():
        yield f"# {group}, and what that needs"
        found, wanted = {}, []
        for requirement in map(Requirement, texts):
            version = installed(requirement.name)
            if version is None or not requirement.specifier.contains(version):
                wanted.append(f"{requirement}  # here: {version or 'not installed'}")
            else:
                collect(requirement.name, requirement.extras, found)
        yield from (f"{name}=={found[name]}" for name in sorted(found.keys() - listed))
        yield from wanted
        listed |= found.keys()


def installed(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def collect(name, extras, found):
    """Add the installed version of a package, and of everything that it needs on this system, by name."""
    name, version = re.sub(r"[-_.]+", "-", name).lower(), installed(name)
    if version is None or (name in found and not extras):
        return
    found[name] = version
    for requirement in map(Requirement, importlib.metadata.requires(name) or []):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            collect(requirement.name, requirement.extras, found)
