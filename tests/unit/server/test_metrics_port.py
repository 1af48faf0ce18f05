"""The metrics port's connections: what is served on them, and how long one may keep a thread."""

from __future__ import annotations

import contextlib
import gzip
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge

from forwardpass.server import metrics_port
from forwardpass.server.metrics_port import MetricsPort


@contextlib.contextmanager
def serving(registry: CollectorRegistry) -> Iterator[MetricsPort]:
    port = MetricsPort(registry, ["127.0.0.1"], 0)
    try:
        yield port
    finally:
        port.stop()


def test_without_a_page_there_are_metrics_alone() -> None:
    registry = CollectorRegistry()
    Gauge("some", "help", registry=registry).set(3)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with serving(registry) as port:
        with opener.open(f"http://127.0.0.1:{port.port}/metrics", timeout=60) as response:
            assert b"some 3.0" in response.read()
        for path in ("/", "/status/snapshot.json", "/health"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                opener.open(f"http://127.0.0.1:{port.port}{path}", timeout=60)
            assert caught.value.code == 404
            caught.value.close()
        assert port.accepts()


def test_a_client_that_asks_for_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics_port, "PATIENCE", 0.2)
    with serving(CollectorRegistry()) as port, socket.create_connection(("127.0.0.1", port.port), 60) as client:
        assert client.recv(1) == b""  # closed by the server
    assert capfd.readouterr().err == ""


def test_a_client_that_takes_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics_port, "PATIENCE", 0.2)
    over = threading.Event()

    def endless(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [])
        try:
            while True:
                yield b"x" * 65536
        finally:
            over.set()

    monkeypatch.setattr(metrics_port, "only_metrics", lambda _: endless)
    with serving(CollectorRegistry()) as port, socket.create_connection(("127.0.0.1", port.port), 60) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert over.wait(60), "the response goes on"
    assert capfd.readouterr().err == ""


class Asked:
    """What a server answers at /metrics, by what is asked for; and how often the quick text was."""

    def __init__(self) -> None:
        self.texts: list[bool] = []
        self.registry = CollectorRegistry()
        Gauge("some", "help", registry=self.registry).set(3)

    def text(self, openmetrics: bool) -> bytes:
        self.texts.append(openmetrics)
        return b"quick 1.0\n"

    @contextlib.contextmanager
    def at(self) -> Iterator[Callable[..., tuple[bytes, str]]]:
        port = MetricsPort(self.registry, ["127.0.0.1"], 0, None, self.text)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def get(query: str = "", **headers: str) -> tuple[bytes, str]:
            request = urllib.request.Request(f"http://127.0.0.1:{port.port}/metrics{query}")
            for name, value in headers.items():
                request.add_header(name.replace("_", "-"), value)
            with opener.open(request, timeout=60) as response:
                body = response.read()
                assert response.headers["Content-Length"] == str(len(body))
                if response.headers["Content-Encoding"] == "gzip":
                    body = gzip.decompress(body)
                return body, response.headers["Content-Type"]

        try:
            yield get
        finally:
            port.stop()


# Of Prometheus 2 and 3 as they scrape, and of a person with curl.
PROMETHEUS_2 = "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"  # noqa: E501
PROMETHEUS_3 = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,*/*;q=0.1"  # noqa: E501


@pytest.mark.parametrize(
    ("accept", "openmetrics", "content_type"),
    [
        (PROMETHEUS_2, True, "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores"),
        (PROMETHEUS_3, True, "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=allow-utf-8"),
        ("*/*", False, "text/plain; version=0.0.4; charset=utf-8"),
        ("text/plain;version=0.0.4", False, "text/plain; version=0.0.4; charset=utf-8"),
    ],
)
def test_scrapers_get_the_quick_text_in_the_format_they_ask_for(
    accept: str, openmetrics: bool, content_type: str
) -> None:
    asked = Asked()
    with asked.at() as get:
        assert get(Accept=accept, Accept_Encoding="gzip") == (b"quick 1.0\n", content_type)
        assert get(Accept=accept) == (b"quick 1.0\n", content_type)
    assert asked.texts == [openmetrics] * 2


@pytest.mark.parametrize(
    ("query", "accept"),
    [
        ("?name[]=some", "*/*"),
        ("", "application/openmetrics-text;version=1.0.0;escaping=dots"),
        ("", "text/plain;version=1.0.0;escaping=values"),
        ("", "application/openmetrics-text;version=2.0.0"),
    ],
)
def test_what_else_prometheus_client_can_is_left_to_it(query: str, accept: str) -> None:
    asked = Asked()
    with asked.at() as get:
        body, _ = get(query, Accept=accept)
    assert b"some 3.0" in body and not asked.texts
