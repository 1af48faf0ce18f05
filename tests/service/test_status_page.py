"""The status page of a real server under real load: over HTTP as a script sees it, and in a browser as people do.

The browser's tests need playwright and a chromium (Debian's: `apt-get install chromium`). With
FORWARDPASS_SCREENSHOTS=FOLDER they write their pictures there, which is how those of docs/images are made.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.service import models
from tests.service.caller import Caller, request

from forwardpass import Client, protocol
from forwardpass.client import CallError
from forwardpass.status.page import FILES, MOST_VIEWERS
from forwardpass.testing.server_process import ServerProcess

Serve = Callable[..., ServerProcess]

NO_HTTP = ("--http-port", "-1")  # then the page is at the metrics port

TOKEN = "a-token-for-people-0123456789"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60_000  # milliseconds that the browser waits for what must come
SCREENSHOTS = os.environ.get("FORWARDPASS_SCREENSHOTS")


def base_of(server: ServerProcess) -> str:
    """Where the page is: at the HTTP port; at the metrics port where there is none."""
    return server.http_url or server.metrics_url.removesuffix("/metrics")


def fetch(url: str, token: str = "") -> Any:
    """The response, not read yet. Raises HTTPError."""
    headers = {"Accept": "text/html,*/*"} | ({"Authorization": f"Bearer {token}"} if token else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(urllib.request.Request(url, headers=headers), timeout=60)


@contextmanager
def load(server: ServerProcess, model: str, width: int, **options: Any) -> Iterator[threading.Event]:
    """Two threads that call a model until the block ends. Yields an event that is set once both had an answer."""
    over, begun = threading.Event(), threading.Barrier(3)

    def call(seed: int) -> None:
        rows = np.random.default_rng(seed).standard_normal((2, width)).astype(np.float32)
        first = True
        with Client(server.address, health_check=False, **options) as client:
            while not over.wait(0.002):
                try:
                    client.infer(model, {"x": rows})
                except CallError:
                    if over.is_set():
                        return
                if first:
                    begun.wait(60)
                    first = False

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    try:
        yield over
    finally:
        over.set()
        for thread in threads:
            thread.join(60)


on_both_ports = pytest.mark.parametrize("options", [(), NO_HTTP], ids=["http", "metrics"])


# -- over HTTP --------------------------------------------------------------------------------------------------------


def events(response: Any) -> Iterator[dict[str, Any]]:
    for line in response:
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


@on_both_ports
def test_events_have_the_figures_of_real_load(serve: Serve, digits_repository: Path, options: tuple[str, ...]) -> None:
    server = serve(digits_repository, *options)
    assert f"status {base_of(server)}/" in server.lines
    with load(server, "digits", 64), fetch(base_of(server) + "/status/events") as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        stream = events(response)
        first, second, third = next(stream), next(stream), next(stream)
    assert first["traffic"] is None and first["server"]["infer"] is bool(server.http_url)
    assert second["traffic"]["requests_per_second"] > 0 and second["traffic"]["rows_per_batch"] >= 2
    assert second["at"] < third["at"] and third["models"][0]["answered"] > second["models"][0]["answered"]
    total = third["traffic"]["stages"]["total"]
    assert 0 < total["p50"] <= total["p99"] < 60


@on_both_ports
@pytest.mark.slow
def test_viewers_are_bounded_and_leave_room(serve: Serve, digits_repository: Path, options: tuple[str, ...]) -> None:
    server = serve(digits_repository, *options)
    url = base_of(server) + "/status/events"
    viewers = [fetch(url) for _ in range(MOST_VIEWERS)]
    for viewer in viewers:
        assert next(events(viewer))["server"]["ready"] is True
    with pytest.raises(urllib.error.HTTPError) as caught:
        fetch(url)
    assert caught.value.code == 503
    caught.value.close()
    assert "forwardpass_ready 1.0" in server.metrics()  # scrapes have threads of their own
    for viewer in viewers:
        viewer.close()
    # The server notices at its next event.
    for _ in range(600):
        try:
            with fetch(url) as again:
                assert next(events(again))["server"]["ready"] is True
                return
        except urllib.error.HTTPError as error:
            assert error.code == 503
            error.close()
            threading.Event().wait(0.1)
    pytest.fail("no viewer's place was given back")


@on_both_ports
def test_a_server_stops_with_its_viewers_there(serve: Serve, digits_repository: Path, options: tuple[str, ...]) -> None:
    server = serve(digits_repository, *options)
    with fetch(base_of(server) + "/status/events") as response:
        stream = events(response)
        next(stream)
        assert server.stop() == 0
        list(stream)  # ends


@on_both_ports
def test_the_page_can_be_turned_off(serve: Serve, digits_repository: Path, options: tuple[str, ...]) -> None:
    server = serve(digits_repository, "--no-status-page", *options)
    for path in (*FILES, "/status/snapshot.json", "/status/events"):
        if path == "/" and not options:  # KServe's clients ask there whether a server lives
            with fetch(base_of(server) + path) as response:
                assert json.load(response) == {"status": "alive"}
            continue
        with pytest.raises(urllib.error.HTTPError) as caught:
            fetch(base_of(server) + path)
        assert caught.value.code == 404
        caught.value.close()


@on_both_ports
def test_with_tokens_figures_need_one(
    serve: Serve, digits_repository: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    (tmp_path / "tokens").write_text(f"infer {TOKEN}\n")
    server = serve(digits_repository, "--tokens", str(tmp_path / "tokens"), *options)
    with fetch(base_of(server) + "/") as response:
        assert response.status == 200
    for path in ("snapshot.json", "events", "models/digits/1/graph.svg", "models/digits/1/sample.json"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            fetch(f"{base_of(server)}/status/{path}")
        assert caught.value.code == 401
        caught.value.close()
        with fetch(f"{base_of(server)}/status/{path}", TOKEN) as response:
            assert response.status == 200


def test_top_prints_a_frame(serve: Serve, digits_repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("rich", reason="needs the extra top")
    (tmp_path / "tokens").write_text(f"infer {TOKEN}\n")
    (tmp_path / "token").write_text(TOKEN)
    server = serve(digits_repository, "--tokens", str(tmp_path / "tokens"))
    command = [sys.executable, "-m", "forwardpass", "top", "--once", "--url", base_of(server)]
    with load(server, "digits", 64, token=TOKEN):
        done = subprocess.run([*command, "--token-file", str(tmp_path / "token")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "digits 1" in done.stdout and "exact" in done.stdout and "requests/s" in done.stdout
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1 and "--token-file" in refused.stderr and "Traceback" not in refused.stderr


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """A page in a browser, and what went wrong in it."""

    def __init__(self, browser: Any, url: str, width: int = 1400, dark: bool = False) -> None:
        scheme = "dark" if dark else "light"
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, locale="en-GB")
        self.page.set_default_timeout(PATIENCE)
        self.problems: list[str] = []
        self.page.on("console", lambda m: m.type in ("error", "warning") and self.problems.append(m.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(url)

    def until(self, expression: str) -> None:
        """Wait until a JavaScript expression holds. The page's policy forbids what playwright's own waiting does."""
        for _ in range(PATIENCE // 50):
            if self.page.evaluate(expression):
                return
            self.page.wait_for_timeout(50)
        pytest.fail(f"never: {expression}")

    def tile(self, title: str) -> str:
        found: str = self.page.locator(f"#tiles .tile:has(dt:text-is('{title}')) dd").inner_text()
        return found

    def picture(self, name: str) -> None:
        if SCREENSHOTS:
            self.page.evaluate("scrollTo(0, 0)")
            self.page.screenshot(path=Path(SCREENSHOTS) / f"status-{name}.png")


@pytest.mark.slow
def test_figures_move_and_a_model_that_stops_shows(
    serve: Serve, browser: Any, digits_repository: Path, tmp_path: Path
) -> None:
    shutil.copytree(digits_repository / "digits", tmp_path / "digits")
    models.save(tmp_path, "chain", models.chain())
    server = serve(tmp_path, "--model-control", "explicit", "--load-model", "*", *NO_HTTP)
    opened = Opened(browser, base_of(server) + "/")
    page = opened.page
    with load(server, "digits", 64):
        opened.until("document.querySelector('#state').textContent === 'ready'")
        opened.until("parseFloat(document.querySelector('#tiles dd')?.textContent.replace(',', '')) > 0")
        answered = "document.querySelectorAll('.card')[1].querySelectorAll('.figures dd')[5].textContent"
        before = page.evaluate(answered)
        opened.until(f"{answered} !== {before!r}")
        assert opened.tile("rows a batch") != "–" and "s" in opened.tile("p99, arrival to answer")
        assert page.locator(".card").count() == 2 and page.locator("#models-count").inner_text() == "2 of 2 serve"
        # The drawing has come, and is one.
        opened.until("document.querySelectorAll('.card .drawing img')[1]?.naturalWidth === 800")
        # By keyboard: to the form, and through the contract's samples.
        card = page.locator(".card", has_text="digits")
        card.locator("details.try summary").focus()
        page.keyboard.press("Enter")
        opened.until(
            "document.activeElement.matches('summary') && document.querySelectorAll('svg.picture').length === 1"
        )
        shown = card.locator("textarea").input_value()
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        card.locator(".place", has_text="sample 2 of").wait_for()
        assert card.locator("textarea").input_value() != shown
        assert card.locator("button.main").is_disabled() and "HTTP port" in card.locator(".given .soft").inner_text()
        caller = Caller(server)
        unload = protocol.METHODS["RepositoryModelUnload"].path
        caller.send(protocol.RepositoryModelUnloadRequest(model_name="chain"), path=unload)
        assert caller.refused(request("chain", np.zeros((1, 4), np.float32))).code == "NOT_FOUND"
        caller.close()
        page.locator(".card[data-state=not_loaded]", has_text="chain").wait_for()
        page.locator("#news", has_text="chain is not loaded").wait_for(state="attached")
        page.locator("#error-rows tr", has_text="NOT_FOUND").wait_for()
        page.locator("#refused-rows tr", has_text="not_loaded").wait_for()
    assert opened.problems == []
    assert server.stop() == 0
    page.locator("#notice", has_text="does not answer").wait_for()
    assert page.locator("#state").inner_text() == "no answer"


def something_to_see(server: ServerProcess, page: Any) -> list[subprocess.Popen[bytes]]:
    """For pictures: a minute of more load than two threads of Python make, and errors."""
    caller = Caller(server)
    for model, width in (("mnist", 784), ("digits", 63)):
        caller.refused(request(model, np.zeros((1, width), np.float32)))
    caller.close()
    command = [sys.executable, "-m", "forwardpass", "loadtest", server.address]
    rates = {"digits": "1500:4500", "document": "200:900"}
    started = [
        subprocess.Popen([*command, model, "--ramp", ramp, "--duration", "70"], stdout=subprocess.DEVNULL)
        for model, ramp in rates.items()
    ]
    page.wait_for_timeout(62_000)
    return started


def test_a_row_is_tried_in_the_form(
    serve: Serve, browser: Any, digits_repository: Path, document_repository: Path, tmp_path: Path
) -> None:
    for repository in (digits_repository, document_repository):
        shutil.copytree(repository, tmp_path, dirs_exist_ok=True)
    server = serve(tmp_path)
    with load(server, "digits", 64):
        opened = Opened(browser, base_of(server))
        page = opened.page
        loads = something_to_see(server, page) if SCREENSHOTS else []
        card = page.locator(".card", has_text="digits")
        card.locator("details.try summary").click()
        page.locator("svg.picture").wait_for()
        card.locator("button.main").click()
        page.locator(".result", has_text="As the contract expects").wait_for()
        assert page.locator(".bars li").count() == 5
        opened.until("document.querySelector('#plot-rate .line.s0') !== null")
        end = int(page.evaluate("document.querySelectorAll('.card')[0].getBoundingClientRect().bottom + scrollY")) + 16
        looks = {
            "light": (1400, end, False),
            "dark": (1400, end, True),
            "phone-light": (390, 1290, False),
            "phone-dark": (390, 1290, True),
        }
        for name, (width, height, dark) in looks.items():
            page.set_viewport_size({"width": width, "height": height})
            page.emulate_media(color_scheme="dark" if dark else "light")
            # Drawn anew at this width, with nothing that pushes the page aside.
            opened.until(
                "[...document.querySelectorAll('.plots svg')].every(e => Number(e.getAttribute('width')) === "
                "Math.max(220, e.parentElement.clientWidth))"
            )
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            opened.picture(name)
        page.set_viewport_size({"width": 1400, "height": 900})
        text = card.locator("textarea")
        text.fill(text.input_value().replace("[1,64]", "[2,32]"))
        card.locator("button.main").click()
        page.locator(".result .warning", has_text="400: ").wait_for()
        text.fill("{")
        card.locator("button.main").click()
        page.locator(".result .warning", has_text="is not JSON").wait_for()
        assert [problem for problem in opened.problems if "400" not in problem] == []
        for process in loads:
            process.wait(120)


def test_the_page_asks_for_a_token(serve: Serve, browser: Any, digits_repository: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"infer {TOKEN}\n")
    server = serve(digits_repository, "--tokens", str(tmp_path / "tokens"))
    opened = Opened(browser, base_of(server) + "/")
    page = opened.page
    page.locator("#token-dialog[open]").wait_for()
    assert page.locator(".card").count() == 0
    page.keyboard.type("a-wrong-token-0123456789")  # the field has the focus
    page.keyboard.press("Enter")
    page.locator("#token-wrong", has_text="the token is not known here").wait_for()
    opened.picture("token")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Give a token").click()
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    page.locator(".card", has_text="digits").wait_for()
    opened.until("document.querySelector('.card .drawing img')?.naturalWidth === 800")
    assert page.evaluate("sessionStorage.getItem('token')") == TOKEN
    assert page.evaluate("document.cookie + JSON.stringify(localStorage)") == "{}"
    assert [problem for problem in opened.problems if "401" not in problem] == []


@pytest.mark.slow
def test_what_a_screen_reader_finds(serve: Serve, browser: Any, digits_repository: Path) -> None:
    server = serve(digits_repository)
    opened = Opened(browser, base_of(server) + "/")
    page = opened.page
    page.locator(".card").wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the figures"
    for role in ("banner", "main", "contentinfo", "navigation"):
        assert page.get_by_role(role).count() == 1, role
    headings = page.get_by_role("heading").evaluate_all("all => all.map(h => Number(h.tagName[1]))")
    assert headings[0] == 1 and all(after - before <= 1 for before, after in itertools.pairwise(headings))
    assert page.evaluate("[...document.querySelectorAll('[aria-live], [role=status]')].length") == 2  # news, a result
    # Every control, figure and region has a name; every table has headers.
    nameless = page.evaluate(
        """() => {
             const all = "button, input, textarea, svg[role=img], img, [role=region], article";
             const named = e => e.getAttribute("aria-label") || e.getAttribute("aria-labelledby")
               || e.hasAttribute("alt") || e.textContent.trim() || e.labels?.length;
             return [...document.querySelectorAll(all)].filter(e => !named(e)).map(e => e.outerHTML);
           }"""
    )
    assert nameless == []
    ids = page.evaluate(
        "[...document.querySelectorAll('[aria-labelledby]')].map(e => e.getAttribute('aria-labelledby'))"
    )
    assert all(page.evaluate("id => document.getElementById(id) !== null", one) for one in ids)
    assert page.get_by_role("columnheader").count() >= 12
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.querySelector('.pill'), '::before').animationName") == "none"
    assert opened.problems == []
