"""`forwardpass top`: which servers it asks, what it says of those that do not answer, and its frame."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from tests.unit.status.conftest import Watched, watched  # noqa: F401

from forwardpass.cli import top
from forwardpass.errors import ForwardpassError

console = pytest.importorskip("rich.console", reason="needs the extra top")
TOKEN = "a-token-0123456789"


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    top.add_arguments(parser)
    return parser.parse_args(argv)


class Answering(HTTPServer):
    """A server with one answer; remembers what it was sent."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.asked: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.path, self.headers["Authorization"]))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def answering() -> Iterator[Callable[..., Answering]]:
    started: list[tuple[Answering, threading.Thread]] = []

    def start(status: int, body: bytes = b"", **headers: str) -> Answering:
        server = Answering(status, headers, body)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    "status, body, said",
    [
        (401, b"{}", r"401: it asks for a token of the role infer: --token-file"),
        (404, b"", r"404: expected a status page there"),
        (500, b"", r"HTTP 500"),
        (200, b"<html>", r"is not a status page: expected JSON"),
    ],
)
def test_what_is_no_snapshot_is_explained(
    answering: Callable[..., Answering], status: int, body: bytes, said: str
) -> None:
    with pytest.raises(ForwardpassError, match=said):
        top.run(arguments("--once", "--url", answering(status, body).url))


def test_a_token_is_not_taken_elsewhere(answering: Callable[..., Answering], tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    other = answering(200, b"{}")
    first = answering(302, Location=other.url)
    with pytest.raises(ForwardpassError, match="HTTP 302"):
        top.run(arguments("--url", first.url, "--token-file", str(tmp_path / "token")))
    assert first.asked == [(top.PATH, f"Bearer {TOKEN}")] and other.asked == []
    for url in ("http://10.255.255.1:8002", "10.255.255.1:8002"):
        with pytest.raises(ForwardpassError, match=r"could be read on the way; --plaintext-token"):
            top.run(arguments("--url", url, "--token-file", str(tmp_path / "token")))


def test_no_server_and_no_address() -> None:
    with pytest.raises(ForwardpassError, match="no answer"):
        top.run(arguments("--url", "http://127.0.0.1:1"))
    with pytest.raises(ForwardpassError, match="expected http://HOST:PORT, got ftp://x"):
        top.run(arguments("--url", "ftp://x"))


@pytest.mark.parametrize("width", [80, 160])
def test_a_frame_has_models_refusals_and_errors(watched: Callable[[], Watched], width: int) -> None:  # noqa: F811
    server = watched()
    first = server.look()
    server.ask("one", 12)
    server.ask("absent[bold]", 2)
    second = server.look()
    for snapshot in (first, second):
        shown = console.Console(width=width, no_color=True, force_terminal=False)
        with shown.capture() as captured:
            shown.print(top.frame(snapshot, "http://x", width, "it went away"))
        text = captured.get()
        assert max(map(len, text.splitlines())) <= width
        assert "one 1" in text and "two 1" in text and "it went away" in text
    assert "12 requests/s" in text and "unknown_model" in text and "NOT_FOUND" in text
    assert "absent[bold]" in text.replace("\n", "")  # no markup of rich
    assert ("run p99" in text) == (width == 160)


def test_figures_as_text() -> None:
    assert [top.count(v) for v in (None, 0, 0.1234, 12345.6, 7.0)] == ["–", "0", "0.123", "12,346", "7"]
    assert [top.duration(v) for v in (None, 0.00025)] == ["–", "250 µs"]
    assert top.memory(None) == "–" and top.memory(3 << 20) == "3 MiB"
    assert top.spark([0.0, 4.0, None, 8.0]) == "▁▄ █" and top.spark([]) == "" == top.spark([0.0, None])
