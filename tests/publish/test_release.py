"""What a release uploads: files that stand alone, addresses only where one was given, all that an sdist must have."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from tests.publish.publish_modules import PUBLISH, ROOT, in_a_clone, load

stage = load("stage")
pytestmark = in_a_clone

TOOLS = ROOT / ".venv-release"
URL = "https://host.example/owner/name"
README = (ROOT / "README.md").read_text("utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
RELATIVE = re.compile(r"\]\((?![a-z]+:|#)[^)]*\)|(?:src|srcset|href)=\"(?![a-z]+:)")


@pytest.mark.parametrize("url", [URL, ""], ids=["with an address", "without"])
def test_the_description_has_no_link_that_needs_the_folder(url: str) -> None:
    assert RELATIVE.search(README), "README itself is read in the folder"
    text = stage.description(README, url, "v1")
    assert not RELATIVE.findall(text)
    assert "```mermaid" not in text
    assert (f"{URL}/blob/v1/docs/client.md" in text) is bool(url)
    assert (f"{URL}/raw/v1/docs/images/diagrams/readme-1.svg" in text) is bool(url)
    assert (f'srcset="{URL}/raw/v1/docs/images/status-dark.png"' in text) is bool(url)


def test_the_install_line_is_the_folders_here_and_an_indexs_there() -> None:
    first = re.compile(r"pip install '(.*?)'")
    own, described = (first.search(text) for text in (README, stage.description(README, URL, "v1")))
    assert own is not None and own[1] == ".[cpu,train]"
    assert described is not None and described[1] == "forwardpass[cpu,train]"
    with pytest.raises(ValueError, match="install: from the folder"):
        stage.description(README.replace("<!-- end of install -->", ""), URL, "v1")


def test_addresses_are_in_the_metadata_only_where_one_is_given() -> None:
    assert "urls" not in tomllib.loads(PYPROJECT)["project"], "no repository has an address yet"
    assert stage.with_urls(PYPROJECT, "", "v1") == PYPROJECT
    before, after = (tomllib.loads(text)["project"] for text in (PYPROJECT, stage.with_urls(PYPROJECT, URL, "v1")))
    urls = after.pop("urls")
    assert after == before
    assert urls["Homepage"] == URL and all(address.startswith(URL) for address in urls.values())


def run(
    *command: str | Path, cwd: Path = ROOT, url: str = "", epoch: str = "1700000000"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PROJECT_URL": url, "SOURCE_DATE_EPOCH": epoch},
    )


def git() -> None:
    if run("git", "rev-parse", "HEAD").returncode:
        pytest.skip("no clone: a release is made of a commit")


def test_an_address_that_is_none_is_refused(tmp_path: Path) -> None:
    done = run(sys.executable, PUBLISH / "stage.py", tmp_path / "tree", url="host.example/name")
    assert done.returncode == 2 and "expected https://HOST/OWNER/NAME" in done.stdout
    assert not (tmp_path / "tree").exists()


def test_a_tree_that_differs_from_its_commit_is_refused(tmp_path: Path) -> None:
    git()
    assert run("git", "clone", "-q", "--no-hardlinks", ROOT, tmp_path / "clone").returncode == 0
    (tmp_path / "clone" / "more.py").write_text("")
    done = run(tmp_path / "clone" / "deploy/publish/release.sh", TOOLS, cwd=tmp_path)
    assert done.returncode == 1 and "differs from HEAD" in done.stdout
    assert not (tmp_path / "clone" / "dist").exists()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    git()
    if not (TOOLS / "bin" / "python").exists():
        pytest.skip("the tools are not there: `make release-tools` gets them")
    folder = tmp_path_factory.mktemp("release")
    for number in ("1", "2"):
        tree = folder / f"tree{number}"
        done = run(TOOLS / "bin" / "python", PUBLISH / "stage.py", tree, url=URL)
        assert done.returncode == 0, done.stdout
        done = run(TOOLS / "bin" / "python", "-m", "build", "--no-isolation", "-o", folder / number, tree)
        assert done.returncode == 0, done.stdout
    return folder


def test_the_same_commit_gives_the_same_files(built: Path) -> None:
    names = sorted(path.name for path in (built / "1").iterdir())
    assert len(names) == 2
    for name in names:
        assert (built / "1" / name).read_bytes() == (built / "2" / name).read_bytes(), name


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_an_index_takes_the_packages_and_shows_their_description(built: Path) -> None:
    wheel, sdist = sorted((built / "1").iterdir(), key=lambda path: path.suffix != ".whl")
    done = run(TOOLS / "bin" / "python", "-m", "twine", "check", "--strict", wheel, sdist)
    assert done.returncode == 0, done.stdout
    found = metadata(wheel)
    assert f"Homepage, {URL}" in found.get_all("Project-URL", [])
    assert "faster" not in found["Summary"], "a claim about speed belongs beside its measurement"


def test_the_sdist_has_what_a_packager_needs(built: Path) -> None:
    (path,) = (built / "1").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "CONTRIBUTING.md",
        "SECURITY.md",
        "CODE_OF_CONDUCT.md",
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "Makefile",
    }
    assert wanted <= names
    assert {".ci/run", "docs/index.md", "docs/examples/README.md", "deploy/publish/mkdocs.yml"} <= names
    assert not [name for name in names if re.match(r"models/\w+/\d", name)], "trained versions are not the project's"
