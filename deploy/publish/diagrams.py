"""The documents' mermaid diagrams as drawings in docs/images/diagrams: `python deploy/publish/diagrams.py` makes them.

Code hosts draw mermaid themselves; the site and the packages' description show the drawings, so that they need no
script of megabytes. A drawing carries the digest of the source it was made of and takes its colours from the page.
Making them needs npm, playwright and a chromium; showing them, nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "images" / "diagrams"
MERMAID = "11.16.0"
MERMAID_SHA256 = "74d7c46dabca328c2294733910a8aa1ed0c37451776e8d5295da38a2b758fb9b"  # of dist/mermaid.min.js
_SOURCE = re.compile(r"^```mermaid\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_DIGEST = re.compile(r"<!-- of ([0-9a-f]{64}) -->\n")
# A colour that mermaid is given, what the drawing has in its place, and what that is where no page says.
_COLOURS = {
    "primaryColor": ("#f1f2f3", "--diagram-node", "#eef3fb"),
    "primaryBorderColor": ("#a1a2a3", "--diagram-border", "#7a9cc9"),
    "primaryTextColor": ("#010203", "--diagram-text", "#1f2328"),
    "titleColor": ("#010203", "--diagram-text", "#1f2328"),
    "textColor": ("#010203", "--diagram-text", "#1f2328"),
    "lineColor": ("#515253", "--diagram-line", "#59636e"),
    "clusterBkg": ("#f7f8f9", "--diagram-group", "#f6f8fa"),
    "clusterBorder": ("#c1c2c3", "--diagram-edge", "#d1d9e0"),
    "edgeLabelBackground": ("#fcfdfe", "--diagram-page", "#ffffff"),
}


class Stale(LookupError):
    """A diagram has no drawing of its present source."""


def digest(source: str) -> str:
    return hashlib.sha256(source.strip().encode()).hexdigest()


def drawn() -> dict[str, Path]:
    """The drawings there are, by the digest of their source."""
    found = {}
    for path in FOLDER.glob("*.svg"):
        match = _DIGEST.match(path.read_text("utf-8"))
        if match:
            found[match[1]] = path
    return found


def drawing(source: str) -> Path:
    """The drawing of a diagram. Raises Stale."""
    path = drawn().get(digest(source))
    if path is None:
        raise Stale(f"no drawing of the diagram {source.strip().splitlines()[0]!r} as it is now: run `make diagrams`")
    return path


def inline(source: str) -> str:
    """A block of HTML for a page of the site. Raises Stale."""
    svg = _DIGEST.sub("", drawing(source).read_text("utf-8"))
    # Letters keep 11 of their 16 pixels; below that the diagram scrolls.
    svg = re.sub(r"max-width: ([\d.]+)px;", lambda m: f"{m[0]} min-width: {float(m[1]) * 0.7:.0f}px;", svg, count=1)
    return f'\n<figure class="diagram">{svg.strip()}</figure>\n\n'


def sources() -> dict[str, str]:
    """Every diagram of the documents by its drawing's name."""
    found = {}
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]:
        for number, source in enumerate(_SOURCE.findall(path.read_text("utf-8")), 1):
            found[f"{path.stem.lower()}-{number}"] = source
    return found


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    wanted = sources()
    script = _mermaid()
    for path in FOLDER.glob("*.svg"):
        if path.stem not in wanted:
            path.unlink()
    for name, svg in _render(script, wanted).items():
        (FOLDER / f"{name}.svg").write_text(f"<!-- of {digest(wanted[name])} -->\n{svg}\n", "utf-8")
    print(f"drew {len(wanted)} diagrams")
    return 0


def _mermaid() -> str:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", f"mermaid@{MERMAID}"], cwd=folder, check=True, capture_output=True)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            member = archive.extractfile("package/dist/mermaid.min.js")
            assert member is not None
            script = member.read()
    found = hashlib.sha256(script).hexdigest()
    if found != MERMAID_SHA256:
        raise SystemExit(f"mermaid {MERMAID}: expected a script of sha256 {MERMAID_SHA256}, got {found}")
    return script.decode()


def _render(script: str, wanted: dict[str, str]) -> dict[str, str]:
    from playwright.sync_api import sync_playwright

    settings = {
        "startOnLoad": False,
        "theme": "base",
        "themeVariables": {key: given for key, (given, _, _) in _COLOURS.items()},
        "fontFamily": "system-ui, sans-serif",
        "htmlLabels": False,
        "flowchart": {"htmlLabels": False, "curve": "basis", "useMaxWidth": True},
        "deterministicIds": True,
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.add_script_tag(content=script)
        page.evaluate(f"mermaid.initialize({json.dumps(settings)})")
        draw = "([name, source]) => mermaid.render(name, source).then((drawing) => drawing.svg)"
        svgs = {name: page.evaluate(draw, [f"diagram-{name}", source]) for name, source in wanted.items()}
        browser.close()
    return {name: _coloured(_shortened(svg)) for name, svg in svgs.items()}


def _shortened(svg: str) -> str:
    """Without what only mermaid's own editor reads, and with lengths to a tenth of a pixel."""
    svg = re.sub(r' data-[a-z-]+="[^"]*"', "", svg)
    head, style, body = re.split(r"(<style>.*?</style>)", svg, maxsplit=1, flags=re.DOTALL)
    return style.join(re.sub(r"\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}", part) for part in (head, body))


def _coloured(svg: str) -> str:
    for given, variable, otherwise in _COLOURS.values():
        red, green, blue = (int(given[i : i + 2], 16) for i in (1, 3, 5))
        for form in (given, f"rgb({red}, {green}, {blue})", f"rgb({red},{green},{blue})"):
            svg = svg.replace(form, f"var({variable}, {otherwise})")
    return svg


if __name__ == "__main__":
    sys.exit(main())
