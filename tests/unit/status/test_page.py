"""The page's answers: who gets what, under which headers, and how many may watch."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.service import models
from tests.unit.status.conftest import Watched, X

from forwardpass.security.tokens import Tokens
from forwardpass.status import page as page_module
from forwardpass.status.page import FILES, MOST_VIEWERS, STATIC, EventStream, StatusPage, StatusReply

INFER, ADMIN = "an-infer-token-0123456789", "an-admin-token-0123456789"


def get(page: StatusPage, path: str, query: str = "", token: str = "", method: str = "GET") -> StatusReply:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    reply = page.respond(path, query, headers, method)
    assert reply is not None, path
    return reply


def header(reply: StatusReply, name: str) -> str:
    (value,) = [value for key, value in reply.headers if key == name]
    return value


def content(reply: StatusReply) -> Any:
    assert isinstance(reply.body, bytes)
    return json.loads(reply.body)


def test_the_shell_and_all_that_it_names_are_there(watched: Callable[[], Watched]) -> None:
    page = watched().page()
    for path, (name, kind) in FILES.items():
        reply = get(page, path)
        assert reply.status == 200 and header(reply, "Content-Type") == kind
        assert reply.body == (STATIC / name).read_bytes() and header(reply, "Content-Length") == str(len(reply.body))
        policy = header(reply, "Content-Security-Policy")
        assert policy.startswith("default-src 'self'") and "unsafe" not in policy
        assert header(reply, "X-Content-Type-Options") == "nosniff"
    assert {path.name for path in STATIC.iterdir()} == {name for name, _ in FILES.values()}
    text = "".join(path.read_text("utf-8") for path in STATIC.iterdir())
    named = set(re.findall(r'"(/status/[\w.]+)"', text)) | {
        f"/status/{n}" for n in re.findall(r'from "\./([\w.]+)"', text)
    }
    assert {path for path in named if path not in ("/status/events", "/status/snapshot.json")} == set(FILES) - {"/"}
    # Nothing comes from elsewhere, and nothing that the policy would refuse is in the document.
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
    document = (STATIC / "index.html").read_text("utf-8")
    assert not re.findall(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src=)", document)


@pytest.mark.parametrize(
    "path", ["/ready", "/status", "/status/", "/status/x", "/status/models/one/1/x", "/status/../x"]
)
def test_other_paths_are_none_of_the_pages(watched: Callable[[], Watched], path: str) -> None:
    assert watched().page().respond(path, "", {}) is None


def test_only_get_and_head(watched: Callable[[], Watched]) -> None:
    page = watched().page()
    assert get(page, "/", method="POST").status == 405 and header(get(page, "/", method="PUT"), "Allow") == "GET, HEAD"
    head = get(page, "/status/snapshot.json", method="HEAD")
    assert head.body == b"" and int(header(head, "Content-Length")) > 100
    for _ in range(3 * MOST_VIEWERS):
        assert get(page, "/status/events", method="HEAD").body == b""  # and no place is taken


def test_models_have_a_drawing_and_samples(watched: Callable[[], Watched], tmp_path: Path) -> None:
    folder = models.save(tmp_path / "models", "one", models.chain())
    models.add_contract(folder, {"x": X}, True)
    page = watched().page()
    drawing = get(page, "/status/models/one/1/graph.svg")
    assert drawing.status == 200 and header(drawing, "Content-Type") == "image/svg+xml"
    assert "script" not in header(drawing, "Content-Security-Policy")
    assert isinstance(drawing.body, bytes) and ElementTree.fromstring(drawing.body).tag.endswith("svg")
    assert get(page, "/status/models/one/1/graph.svg").body is drawing.body  # drawn once
    first, second = (content(get(page, "/status/models/one/1/sample.json", f"row={row}")) for row in (0, 3))
    assert first["inputs"][0]["data"] == X[0].tolist() and second["inputs"][0]["data"] == X[1].tolist()
    assert second["row"] == 1 and second["rows"] == 2 and second["source"] == "contract"
    for query in ("row=-1", "row=x", "row=" + "9" * 5000, "row=²", "other=1"):
        assert content(get(page, "/status/models/one/1/sample.json", query))["row"] == 0
    for path in ("/status/models/one/2/graph.svg", "/status/models/absent/1/sample.json"):
        assert get(page, path).status == 404 and "error" in content(get(page, path))


def test_a_model_whose_file_is_gone_has_no_drawing(watched: Callable[[], Watched], tmp_path: Path) -> None:
    server = watched()
    (tmp_path / "models" / "one" / "1" / "model.onnx").unlink()
    reply = get(server.page(), "/status/models/one/1/graph.svg")
    assert reply.status == 404 and "model.onnx cannot be read" in content(reply)["error"]


def test_with_tokens_the_shell_alone_is_open(watched: Callable[[], Watched], tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"infer {INFER}\nadmin {ADMIN}\n")
    page = watched().page(Tokens(path))
    assert all(get(page, shell).status == 200 for shell in FILES)
    data = (
        "snapshot.json",
        "events",
        "models/one/1/graph.svg",
        "models/one/1/sample.json",
        "models/absent/1/sample.json",
    )
    for name in data:
        for token in ("", "another-token-0123456789"):
            refused = get(page, f"/status/{name}", token=token)
            assert refused.status == 401 and header(refused, "WWW-Authenticate") == "Bearer"
            assert content(refused).keys() == {"error"}
    for token in (INFER, ADMIN):
        assert get(page, "/status/snapshot.json", token=token).status == 200


def test_a_stream_ends_when_its_token_is_withdrawn(
    watched: Callable[[], Watched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "EVERY", 0.0)
    path = tmp_path / "tokens"
    path.write_text(f"infer {INFER}\n")
    tokens = Tokens(path)
    stream = get(watched().page(tokens), "/status/events", token=INFER).body
    assert isinstance(stream, EventStream)
    events = iter(stream)
    assert next(events).startswith(b"data: {")
    path.write_text(f"infer {ADMIN}\n")
    tokens.watched.read_again()
    assert list(events) == []


def test_viewers_are_bounded_and_make_room_when_they_leave(watched: Callable[[], Watched]) -> None:
    page = watched().page()
    streams = [get(page, "/status/events").body for _ in range(MOST_VIEWERS)]
    refused = get(page, "/status/events")
    assert refused.status == 503 and "snapshot.json" in content(refused)["error"]
    begun, untouched = streams[0], streams[1]
    assert isinstance(begun, EventStream) and isinstance(untouched, EventStream)
    next(iter(begun))
    for stream in (begun, begun, untouched):  # read from or not, and closed twice
        stream.close()
    assert [get(page, "/status/events").status for _ in range(3)] == [200, 200, 503]


def test_streams_end_when_the_server_stops(watched: Callable[[], Watched]) -> None:
    page = watched().page()
    stream = get(page, "/status/events").body
    assert isinstance(stream, EventStream)
    events = iter(stream)
    data = next(events)
    assert data.endswith(b"\n\n") and json.loads(data.removeprefix(b"data: "))["server"]["ready"] is True
    page.stop()
    assert list(events) == [] and list(iter(get(page, "/status/events").body)) == []
    assert all(get(page, "/status/events").status == 200 for _ in range(MOST_VIEWERS))


def test_a_stream_can_be_read_by_an_event_loop(watched: Callable[[], Watched]) -> None:
    page = watched().page()

    async def read() -> list[bytes]:
        stream = get(page, "/status/events").body
        assert isinstance(stream, EventStream)
        found = []
        async for event in stream:
            found.append(event)
            page.stop()
        return found

    (event,) = asyncio.run(read())
    assert event.startswith(b"data: {")
