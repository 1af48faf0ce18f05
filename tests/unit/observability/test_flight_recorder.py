"""The rings of the flight recorder: bounded, readable while they are written, and keeping nothing else alive."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

from forwardpass.errors import Reason
from forwardpass.observability.flight_record import pack_single
from forwardpass.observability.flight_recorder import FlightRecorder

CLOSED = ("full", "idle")


def single(number: int, i: int) -> bytes:
    request = SimpleNamespace(arrival=float(i), deadline=float("inf"), rows=1, id_field=b"")
    return pack_single(number, 1, request, i + 0.3, ((), (), i + 0.1, 0.2, i + 0.4, 1))


def test_the_last_are_kept_and_no_more() -> None:
    recorder = FlightRecorder(5, CLOSED, clock=lambda: 7.0)
    track = recorder.track("m", "1")
    for i in range(12):
        track.keep(single(track.number, i))
        track.refused("NOT_FOUND", Reason.UNKNOWN_MODEL, i)
    found = recorder.dump("a test")
    assert [round(batch["taken"], 1) for batch in found["batches"]] == [7.1, 8.1, 9.1, 10.1, 11.1]
    assert [refusal["requests"] for refusal in found["refused"]] == [7, 8, 9, 10, 11]
    assert found["refused"][0] == {
        "time": 7.0, "model": "m", "version": "1", "status": "NOT_FOUND", "reason": "unknown_model", "requests": 7
    }  # fmt: skip
    assert (found["cause"], found["kept"], found["at"]) == ("a test", 5, 7.0)
    assert json.loads(json.dumps(found)) == found


def test_models_keep_their_numbers_and_outcomes_their_requests() -> None:
    recorder = FlightRecorder(8, CLOSED)
    first, other = recorder.track("m", "1"), recorder.track("m", "2")
    assert recorder.track("m", "1").number == first.number != other.number
    other.keep((single(other.number, 0), [("INTERNAL", Reason.RUN_FAILED)]))
    (batch,) = recorder.dump("a test")["batches"]
    assert (batch["model"], batch["version"], batch["closed"]) == ("m", "2", "idle")
    assert batch["each"] == [{"arrival": 0.0, "rows": 1, "status": "INTERNAL", "reason": "run_failed"}]


def test_it_is_read_while_many_threads_write() -> None:
    recorder = FlightRecorder(256, CLOSED)
    over = threading.Event()

    def write(version: str) -> None:
        track = recorder.track("m", version)
        i = 0
        while not over.is_set():
            track.keep(single(track.number, i))
            track.refused("CANCELLED", Reason.CANCELLED, 1)
            i += 1

    threads = [threading.Thread(target=write, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            found = recorder.dump("a test")
            assert len(found["batches"]) <= 256 and len(found["refused"]) <= 256
            for version in "0123":  # in order, none lost between two that are there
                seen = [round(b["each"][0]["arrival"]) for b in found["batches"] if b["version"] == version]
                assert seen == list(range(seen[0], seen[0] + len(seen))) if seen else True
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert len(recorder.dump("a test")["batches"]) == 256
