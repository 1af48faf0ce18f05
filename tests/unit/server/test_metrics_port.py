"""The metrics port's connections: what is served on them, and how long one may keep a thread."""

from __future__ import annotations

import contextlib
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
