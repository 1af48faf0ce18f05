"""The access log: who gets a line, what is in it, and what happens when more come than can be written."""

from __future__ import annotations

import logging
import random

import pytest

from forwardpass.errors import Reason
from forwardpass.observability import access_log
from forwardpass.observability.access_log import AccessEntry, AccessLog, Origin, line_of, trace_id

ENTRY = AccessEntry("m", "1", b"\x1a\x03one", 2, None, 0.0012345, 0.002, 0.004, 8, Origin())
KEY = "forwardpass_fields"


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
def test_a_share_of_requests_is_sampled(rate: float) -> None:
    log = AccessLog(rate, draw=random.Random(1).random)
    count = sum(log.sampled() for _ in range(20_000))
    assert count == 20_000 if rate == 1.0 else abs(count / 20_000 - rate) < 0.02


def test_errors_have_a_rate_of_their_own() -> None:
    now = [0.0]
    log = AccessLog(0.001, clock=lambda: now[0])
    assert sum(log.error_allowed() for _ in range(1000)) == 20
    now[0] = 0.5
    assert sum(log.error_allowed() for _ in range(1000)) == 10
    now[0] = 1000.0
    assert sum(log.error_allowed() for _ in range(1000)) == 20


def test_what_waits_is_bounded_and_what_is_dropped_is_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_log, "WAITING", 5)
    log = AccessLog(1.0)
    for i in range(8):  # nothing writes yet
        log.put(ENTRY._replace(rows=i))
    monkeypatch.setattr(logging.getLogger(), "level", logging.ERROR)  # its lines are written all the same
    log.start()
    log.close()
    found = [getattr(record, KEY) for record in caplog.records]
    assert [line["rows"] for line in found] == [0, 1, 2, 3, 4]
    assert [line.get("lines_dropped") for line in found] == [3, None, None, None, None]


def test_a_line() -> None:
    origin = Origin("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", lambda: "10.0.0.1:5000")
    assert line_of(ENTRY._replace(origin=origin))[KEY] == {
        "request_id": "one", "model": "m", "version": "1", "rows": 2, "status": "OK", "queue_ms": 1.234, "run_ms": 2.0,
        "total_ms": 4.0, "batch_rows": 8, "trace_id": "0af7651916cd43dd8448eb211c80319c", "peer": "10.0.0.1:5000",
    }  # fmt: skip
    refused = AccessEntry("", "", b"", None, ("NOT_FOUND", Reason.UNKNOWN_MODEL), None, None, 0.0, None, Origin(), 1)
    assert line_of(refused, 7)[KEY] == {
        "model": "", "version": "", "status": "NOT_FOUND", "reason": "unknown_model", "total_ms": 0.0,
        "lines_dropped": 7,
    }  # fmt: skip


def test_long_and_odd_ids_are_cut_and_printable() -> None:
    line = line_of(ENTRY._replace(id_field=b"\x1a\x80\x01" + b"\n" + b"x" * 125))[KEY]
    assert line["request_id"] == "\\x0a" + "x" * 63 + "…"
    assert line_of(ENTRY._replace(id_field=b"\x1a\x02\xff\xfe"))[KEY]["request_id"] == "��"


GOOD = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("header", "there"),
    [
        (GOOD, True), (GOOD.replace("00-", "cc-", 1) + "-what-comes-later", True), ("", False), ("x", False),
        (GOOD + "-more", False), (GOOD.replace("00-", "ff-", 1), False), (GOOD.upper(), False), (GOOD + "\n", False),
        ("00-" + "0" * 32 + GOOD[35:], False), (GOOD[:36] + "0" * 16 + "-01", False), (" " + GOOD, False),
    ],
)  # fmt: skip
def test_trace_ids(header: str, there: bool) -> None:
    assert trace_id(header) == ("0af7651916cd43dd8448eb211c80319c" if there else None)
