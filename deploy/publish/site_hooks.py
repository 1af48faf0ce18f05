"""What mkdocs cannot do by itself for the site: pages made of files outside docs/, links to such files, diagrams.

The documents stay as they are for code hosts. `PROJECT_URL` is the repository's address: links to files that are no
pages lead there; without it they are plain text. Everything that is missing is an error, which stops the build.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

import diagrams  # noqa: E402
import links  # noqa: E402

# By page: the file it is made of, and for a part of it the part's heading.
MADE = {
    "options.md": ("README.md", "Serving"),
    "metrics.md": ("README.md", "Metrics"),
    "contributing.md": ("CONTRIBUTING.md", ""),
    "changelog.md": ("CHANGELOG.md", ""),
    "security.md": ("SECURITY.md", ""),
    "conduct.md": ("CODE_OF_CONDUCT.md", ""),
}
# README's headings that lead to one of those; the rest of it is the home page's.
_PARTS = {"#serving": "options.md", "#metrics": "metrics.md"}
_LANGUAGES = {".py": "python", ".go": "go", ".js": "javascript", ".cc": "cpp", ".sh": "bash"}


_WIDE = "---\nhide: [toc]\n---\n"  # a part of README is a table of many columns, with no headings to list beside it
_titles: dict[str, str] = {}  # of the pages, as the navigation has them


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.repo_url = config.extra["project_url"] or None
    _titles.update((uri, title) for section in config.nav or [] for title, uri in _pages(section))
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    for page, (name, heading) in MADE.items():
        text = (ROOT / name).read_text("utf-8")
        files.append(File.generated(config, page, content=_WIDE + _part(text, name, heading) if heading else text))
    icon = ROOT / "server" / "forwardpass" / "status" / "static" / "icon.svg"
    for asset in (HERE / "site.css", icon):
        files.append(File.generated(config, f"assets/{asset.name}", abs_src_path=str(asset)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    uri = page.file.src_uri
    document = MADE[uri][0] if uri in MADE else f"docs/{uri}"
    if document.startswith("docs/examples/"):
        markdown += _programs(ROOT / "docs" / "examples")
    elsewhere = links.on_a_host(config.extra["project_url"], config.extra["project_ref"])

    def place(target: links.Target) -> str | None:
        if not (ROOT / target.path).exists():
            raise PluginError(f"{document}: there is no {target.path} to link to")
        inside = _page(target)
        return elsewhere(target) if inside is None else posixpath.relpath(inside, posixpath.dirname(uri) or ".")

    def words(link: str, target: links.Target) -> str:
        # On a code host a page's name is its file's.
        inside = _page(target) if link.endswith(".md") else None
        return link if inside is None else _titles.get(inside.partition("#")[0], link)

    try:
        return links.with_diagrams(links.mapped(markdown, document, place, words), diagrams.inline)
    except (ValueError, diagrams.Stale) as error:
        raise PluginError(f"{document}: {error}") from error


def on_page_content(html: str, **_: Any) -> str:
    # A browser breaks lines within `--option` after its hyphens; site.css keeps names of no great length whole.
    return re.sub(r"<code>([^<\s]{1,32})</code>", r'<code class="whole">\1</code>', html)


def _pages(section: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A section of the navigation: the title and path of each page below it."""
    for title, content in section.items():
        if isinstance(content, str):
            yield title, content
        else:
            for inner in content:
                yield from _pages(inner)


def _page(target: links.Target) -> str | None:
    """The site's own path of a target, with the heading; None: it is no part of the site."""
    path, heading = target.path, target.heading
    if path == "README.md":
        return _PARTS.get(heading, "index.md") + (heading if heading not in _PARTS else "")
    for page, (name, part) in MADE.items():
        if name == path and not part:
            return page + heading
    if path.startswith("docs/"):
        inside = path.removeprefix("docs/")
        if inside.startswith("examples/") and not inside.endswith(".md"):
            return f"examples/README.md#{inside.removeprefix('examples/').replace('.', '')}"
        return (f"{inside}/README.md" if (ROOT / path).is_dir() else inside) + heading
    return None


def _part(text: str, name: str, heading: str) -> str:
    """The part of a document below one of its second headings, as a document."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise PluginError(f"{name} has no heading '## {heading}' to make a page of")
    return f"# {heading}\n{found[1]}"


def _programs(folder: Path) -> str:
    """The gallery's programs as they are in its folder, each below a heading: on a code host they are a click away."""
    parts = []
    for path in sorted(folder.iterdir()):
        if path.suffix in _LANGUAGES:
            source = path.read_text("utf-8")
            parts.append(f"\n## {path.name}\n\n```{_LANGUAGES[path.suffix]}\n{source}```\n")
    return "".join(parts)
