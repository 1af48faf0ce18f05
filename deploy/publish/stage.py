"""Copies what git has at HEAD into a folder, as packages are built from it: `python deploy/publish/stage.py FOLDER`.

Two files differ from the repository's. README.md, which becomes the packages' description, has links that work without
the repository around it, and the install line of an index. pyproject.toml has `project.urls`. `PROJECT_URL` is the
repository's address; without it there are no such URLs, and README's links to files are plain text.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import diagrams
import links

ROOT = Path(__file__).resolve().parents[2]
# README's block for those that have this folder, and what stands there for those that have an index.
_INSTALL = re.compile(r"<!-- install: from the folder -->\n.*?<!-- end of install -->\n", re.DOTALL)
_FROM_INDEX = """```sh
pip install 'forwardpass[cpu,train]'    # the server alone needs only forwardpass[cpu]
```
"""


def description(readme: str, url: str, ref: str) -> str:
    """README as an index shows it. Raises ValueError where its install block is not found, once."""
    text, count = _INSTALL.subn(lambda _: _FROM_INDEX, readme)
    if count != 1:
        raise ValueError(f"README.md: expected one block '<!-- install: from the folder -->', got {count}")
    place = links.on_a_host(url, ref)

    def drawing(source: str) -> str:
        path = diagrams.drawing(source).relative_to(ROOT).as_posix()
        address = place(links.Target(path, "", True))
        return "" if address is None else f"![diagram]({address})\n"

    return links.with_diagrams(links.mapped(text, "README.md", place), drawing)


def with_urls(pyproject: str, url: str, ref: str) -> str:
    """pyproject.toml with `project.urls` of the repository at `url`."""
    if not url:
        return pyproject
    addresses = {
        "Homepage": url,
        "Documentation": f"{url}/blob/{ref}/docs/index.md",
        "Changelog": f"{url}/blob/{ref}/CHANGELOG.md",
        "Issues": f"{url}/issues",
    }
    table = "".join(f'{name} = "{address}"\n' for name, address in addresses.items())
    before, found, after = pyproject.partition("[project.optional-dependencies]\n")
    if not found:
        raise ValueError("pyproject.toml: expected the table [project.optional-dependencies] to put URLs before")
    return f"{before}[project.urls]\n{table}\n{found}{after}"


def main() -> int:
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} FOLDER, which must not exist; PROJECT_URL=https://...", file=sys.stderr)
        return 2
    folder, url = Path(sys.argv[1]), os.environ.get("PROJECT_URL", "").rstrip("/")
    if url and not re.fullmatch(r"https://[\w.-]+(/[\w.~-]+)+", url):
        print(f"PROJECT_URL: expected https://HOST/OWNER/NAME, got {url}", file=sys.stderr)
        return 2
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    tree = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    folder.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(tree)) as archive:
        archive.extractall(folder, filter="data")
    for name, change in (("README.md", description), ("pyproject.toml", with_urls)):
        path = folder / name
        path.write_text(change(path.read_text("utf-8"), url, f"v{version}"), "utf-8")
    if f"## [{version}]" not in (folder / "CHANGELOG.md").read_text("utf-8"):
        print(f"note: CHANGELOG.md has no section [{version}] yet: nothing to upload, but all else is as it will be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
