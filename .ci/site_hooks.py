"""Hooks of the documentation site: pages that also read well in the repository become pages of the site."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

DOCS = Path(__file__).parents[1] / "worldloom" / "docs"


def on_files(files, config):
    """Add the changelog, which is beside the pages, as a page; its links are relative to another folder."""
    text = (DOCS.parent / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "changes.md", content=text))
    # Pictures of measurements are shown where they are explained.
    for path in (DOCS.parents[1] / "benchmarks" / "results").glob("*.png"):
        files.append(File.generated(config, f"assets/results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to files of the repository that are no pages lead to the repository."""
    folder = posixpath.dirname(page.file.src_uri)

    def replace(match):
        target = posixpath.normpath(posixpath.join("worldloom/docs", folder, match[2]))
        picture = re.fullmatch(r"benchmarks/results/([\w.-]+\.png)", target)
        if picture:
            return f"]({posixpath.relpath(f'assets/results/{picture[1]}', folder or '.')})"
        if target.startswith("worldloom/docs/"):
            return match[0]
        return f"]({config.repo_url.rstrip('/')}/blob/main/{target}{match[3]})"

    return re.sub(r"(\]\()(\.\./[^)#\s]*)(#[^)]*)?\)", lambda m: replace([m[0], m[1], m[2], m[3] or ""]), markdown)


def on_page_content(html, page, config, files):
    """Docstrings refer to names as Sphinx does: :class:`~module.Name`."""
    html = re.sub(r":(?:class|func|meth|attr|data|mod|exc):(?=<code>)", "", html)
    return re.sub(r"<code>~(?:\w+\.)*(\w+)</code>", r"<code>\1</code>", html)
