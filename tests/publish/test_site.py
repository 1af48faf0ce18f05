"""The site, built as `make docs` builds it: every link leads somewhere, nothing comes from elsewhere, search finds."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from tests.publish.publish_modules import ROOT

PYTHON = ROOT / ".venv-docs" / "bin" / "python"
URL = "https://host.example/owner/name"
PARTS = ("deploy/publish", "docs", "server/forwardpass", "tests", "models", "benchmarks", "proto")


def build(root: Path, site: Path, url: str = "") -> subprocess.CompletedProcess[str]:
    if not PYTHON.exists():
        pytest.skip("mkdocs is not there: `make docs` gets it")
    command = [PYTHON, "-m", "mkdocs", "build", "--strict", "-f", root / "deploy/publish/mkdocs.yml", "-d", site]
    return subprocess.run(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PROJECT_URL": url, "SITE_URL": ""},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout
    return folder


class Page(HTMLParser):
    """The addresses that a page links to and those that it loads, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.anchors: set[str] = {""}
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag in ("a", "area"):
            self.links.add(values.get("href", ""))
        else:
            self.loads |= {values[name] for name in ("src", "href", "srcset") if name in values}


def inside(address: str) -> bool:
    return not address.startswith(("http:", "https:", "mailto:", "data:", "//"))


def test_every_link_leads_somewhere(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 30
    dead = []
    for path, page in pages.items():
        for address in filter(inside, page.links | page.loads):
            file, _, anchor = unquote(address).partition("#")
            target = (path.parent / file).resolve() if file else path
            if target.is_dir():
                target /= "index.html"
            if not target.exists() or (target in pages and anchor not in pages[target].anchors):
                dead.append(f"{path.name}: {address}")
    assert not dead


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    loaded = {address for path in site.rglob("*.html") for address in Page(path).loads}
    assert loaded and not [address for address in loaded if not inside(address) and not address.startswith("data:")]


@pytest.mark.slow
def test_without_an_address_links_to_other_files_are_text_and_with_one_they_lead_there(
    site: Path, tmp_path: Path
) -> None:
    assert "host.example" not in (site / "kubernetes.html").read_text("utf-8")
    done = build(ROOT, tmp_path, URL)
    assert done.returncode == 0, done.stdout
    assert f"{URL}/blob/main/deploy/helm/forwardpass/values.yaml" in Page(tmp_path / "kubernetes.html").links


@pytest.mark.slow
@pytest.mark.parametrize(
    ("addition", "said"),
    [
        ("[x](nothing.md)", "docs/index.md: there is no docs/nothing.md to link to"),
        ("[x](../tests/nothing.py)", "docs/index.md: there is no tests/nothing.py to link to"),
        ("[x](http.md#nowhere)", "does not contain an anchor '#nowhere'"),
        ("```mermaid\nflowchart LR\n    a --> b\n```", "make diagrams"),
    ],
)
def test_a_dead_link_or_an_undrawn_diagram_stops_the_build(addition: str, said: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in PARTS:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "[0-9]*"))
    for path in (*ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "LICENSE"):
        shutil.copy2(path, root)
    shutil.copytree(ROOT / "deploy" / "helm", root / "deploy" / "helm")
    with (root / "docs" / "index.md").open("a", encoding="utf-8") as file:
        file.write(f"\n{addition}\n")
    done = build(root, tmp_path / "site")
    assert done.returncode != 0 and said in done.stdout, done.stdout


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_in_a_browser_search_finds_and_nothing_else_is_asked(address: str) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not there")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(color_scheme="dark")
        asked: list[str] = []
        failed: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("response", lambda response: failed.append(response.url) if response.status >= 400 else None)
        page.goto(f"{address}/kubernetes.html")
        assert page.locator(".diagram svg text").count() > 5
        page.wait_for_selector("body[data-md-color-scheme=slate]")
        page.click(".md-search__input")
        page.keyboard.type("deadline")
        page.wait_for_selector(".md-search-result__item")
        browser.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not failed
