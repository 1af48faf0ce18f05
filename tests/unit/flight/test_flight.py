"""A dump read, summed up and drawn: every request is there, and a file that is none is refused with the reason."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forwardpass.batching.request import Closed
from forwardpass.cli.main import main
from forwardpass.errors import ForwardpassError, Reason
from forwardpass.flight.dump_file import Dump, read
from forwardpass.flight.summary import as_text, summaries
from forwardpass.flight.timeline_page import WHY, as_html
from forwardpass.flight.trace_events import as_trace
from forwardpass.observability.flight_record import pack, pack_single
from forwardpass.observability.flight_recorder import FlightRecorder

EVIL = "</script><script>alert(1)</script>"


def field(text: str) -> bytes:
    return b"\x1a" + bytes([len(text)]) + text.encode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A dump as the recorder makes it, of two models and every kind of event."""
    recorder = FlightRecorder(16, Closed.NAMES, clock=lambda: 1011.0)
    first, second = recorder.track("m", "1"), recorder.track("other", "2")
    request = SimpleNamespace(arrival=1000.0, deadline=1000.5, rows=1, id_field=field(EVIL))
    note = ((), (), 1000.001, 0.002, 1000.005, 1)
    first.keep(pack_single(first.number, Closed.ALONE, request, 1000.004, note))
    second.keep(
        (
            pack(
                second.number,
                Closed.FULL,
                1,
                (1000.02, 0.01, 1000.031, 1000.032),
                matrices=(6, 3, 3),
                requests=3,
                answered=2,
                groups=((1000.01, 2), (1000.015, 1)),
                deadlines=None,
                rows=(1, 2, 3),
                id_fields=(b"", field("b"), field("c")),
            ),
            [None, ("INTERNAL", Reason.RUN_FAILED), None],
        )
    )
    second.refused("INTERNAL", Reason.RUN_FAILED, 1)
    recorder.track("", "").refused("NOT_FOUND", Reason.UNKNOWN_MODEL, 3)
    found = tmp_path / "dump.json"
    found.write_text(json.dumps({"pid": 7, "forwardpass": "0", **recorder.dump("a test")}))
    return found


def test_times_are_since_the_first_event(path: Path) -> None:
    dump = read(path)
    assert dump.span == pytest.approx(11.0) and [b.arrived for b in dump.batches] == pytest.approx([0.0, 0.01])
    assert [r.request_id for b in dump.batches for r in b.each] == [EVIL, "", "b", "c"]
    assert [r.outcome for r in dump.batches[1].each] == ["", "INTERNAL: run_failed", ""]
    assert [b.rows for b in dump.batches] == [1, 6]


def test_the_summary_adds_up(path: Path) -> None:
    dump = read(path)
    assert [(s.name, s.batches, s.requests, s.failed) for s in summaries(dump)] == [
        ("m 1", 1, 1, 0),
        ("other 2", 1, 3, 1),
    ]
    text = as_text(dump)
    assert "written because of a test" in text and "other 2 closed: full 100%" in text
    assert "not answered with success: 3 of no model: NOT_FOUND: unknown_model" in text


def data_of(html: str) -> Any:
    (found,) = re.findall(r'<script type="application/json" id="flight">(.*?)</script>', html, re.DOTALL)
    return json.loads(found)


def test_the_page_has_every_request_and_runs_nothing_of_theirs(path: Path) -> None:
    html = as_html(read(path))
    assert (
        "alert(1)</script>" not in html and html.count("<script") == 2 and "http" not in html.replace("http-equiv", "")
    )
    data = data_of(html)
    assert data["models"] == ["m 1", "other 2"] and data["lanes"] == [[0, -1], [1, 1]]
    alone, full = data["batches"]
    assert alone == [
        0,
        data["closed"].index("alone"),
        1000.0,
        2000.0,
        4000.0,
        5000.0,
        1,
        1,
        [1],
        [0.0, 1, EVIL, 5e5, ""],
    ]
    assert full[6:9] == [3, 2, [6, 3, 3]] and [r[0] for r in full[9:]] == [10_000.0, 10_000.0, 15_000.0]
    assert [refusal[0] for refusal in data["refused"]] == [1, -1]


def test_every_reason_to_close_has_its_words_and_its_colour() -> None:
    assert set(WHY) == set(Closed.NAMES)
    style = (Path(as_html.__code__.co_filename).parent / "timeline.css").read_text("utf-8")
    assert all(style.count(f"--{name}:") == 2 for name in WHY), "light and dark"


def test_the_trace_is_what_chrome_reads(path: Path) -> None:
    trace = as_trace(read(path))
    events = trace["traceEvents"]
    assert json.loads(json.dumps(trace)) == trace
    kinds = Counter(event["ph"] for event in events)
    assert kinds["X"] == 6 and kinds["b"] == kinds["e"] == 8 and kinds["i"] == 2
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")
    for number in range(4):  # every request is one span from its arrival to its answer
        mine = [event for event in events if event.get("id") == number and event["name"] != "queue"]
        assert [event["ph"] for event in mine] == ["b", "e"] and mine[0]["ts"] <= mine[1]["ts"]
    waiting = [event["args"]["requests"] for event in events if event["ph"] == "C" and event["pid"] == 3]
    assert waiting == [2, 3, 0]


def test_the_command(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html, trace = tmp_path / "out.html", tmp_path / "out.json"
    assert main(["flight", str(path), "--html", str(html), "--trace", str(trace)]) == 0
    assert "2 batches, 4 requests" in capsys.readouterr().out
    assert data_of(html.read_text("utf-8"))["span"] and json.loads(trace.read_text("utf-8"))["traceEvents"]
    assert main(["flight", str(path), "--html", str(tmp_path / "nowhere" / "out.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected JSON"),
        ("[]", "expected forwardpass-flight version 1, got None"),
        ('{"format": "forwardpass-flight", "format_version": 2}', "got forwardpass-flight version 2"),
        ('{"format": "forwardpass-flight", "format_version": 1}', "something missing"),
        ('{"format": "forwardpass-flight", "format_version": 1, "batches": [3], "refused": []}', "something missing"),
    ],
)
def test_what_is_no_dump_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ForwardpassError, match=re.escape(reason)):
        read(tmp_path / "file")
    with pytest.raises(ForwardpassError, match="cannot be read"):
        read(tmp_path / "nowhere")


def test_an_empty_dump_can_be_drawn(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps(FlightRecorder(4, Closed.NAMES).dump("nothing")))
    dump: Dump = read(tmp_path / "file")
    assert data_of(as_html(dump))["batches"] == [] and as_trace(dump)["traceEvents"] == []
    assert as_text(dump).startswith("0 batches, 0 requests")
