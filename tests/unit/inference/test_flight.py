"""What a worker leaves in the flight recorder: each batch with its requests, and nothing that keeps those alive."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from tests.service import models
from tests.unit.batching.bench import Bench, rows
from tests.unit.made import Collector

from forwardpass.batching.request import Closed
from forwardpass.observability.flight_recorder import FlightRecorder


def recorded(b: Bench, size: int = 100) -> FlightRecorder:
    recorder = FlightRecorder(size, Closed.NAMES)
    b.metrics.flight = recorder.track("m", "1")
    return recorder


def batches(recorder: FlightRecorder) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = recorder.dump("a test")["batches"]
    for batch in found:
        assert batch["taken"] <= batch["ended"] <= batch["done"]
        assert 0 <= batch["run"] <= batch["done"] - batch["taken"]
        assert all(request["arrival"] <= batch["taken"] for request in batch["each"])
    return found


def test_a_request_alone(bench: Callable[..., Bench]) -> None:
    b = bench(models.chain(), inline=10.0)
    recorder = recorded(b)
    request = b.request(rows(3), id="mine", seconds=60.0)
    assert b.admission.admit(1, request.nbytes) is None
    assert b.worker.try_run_now(request, request.arrival)
    (batch,) = batches(recorder)
    assert (batch["closed"], batch["instance"], batch["matrices"], batch["answered"]) == ("alone", -1, [3], 1)
    assert batch["each"] == [{"arrival": request.arrival, "rows": 3, "id": "mine", "deadline": request.deadline}]


def test_a_batch_of_requests_that_differ(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold(), max_batch_rows=64)
    recorder = recorded(b)
    held = b.hold()
    sent = [
        b.request(
            np.full((1 + i % 3, 1), -1, np.float32), id=f"r{i}" if i % 2 else "", seconds=60.0 if i % 4 == 0 else None
        )
        for i in range(12)
    ]
    b.submit(*sent)
    gone = b.request(np.full((1, 1), -1, np.float32), id="gone")
    b.submit(gone)
    b.worker.cancel(gone)
    b.let_go()
    b.sink.wait([held, *sent])
    b.settled()
    first, second = batches(recorder)
    assert first["each"][0]["status"] == "DEADLINE_EXCEEDED" and first["each"][0]["reason"] == "run_timeout"
    assert (first["answered"], second["answered"], second["requests"]) == (0, 12, 12)
    assert (second["closed"], second["instance"], second["matrices"]) == ("idle", 0, [24])
    by_id = {request.get("id", ""): request for request in second["each"]}
    for i, request in enumerate(sent):
        if i % 2:
            assert by_id[f"r{i}"]["rows"] == request.rows
            assert by_id[f"r{i}"].get("deadline", math.inf) == request.deadline
    assert sorted(r["rows"] for r in second["each"]) == sorted(r.rows for r in sent)
    (refusal, late) = sorted(recorder.dump("a test")["refused"], key=lambda r: str(r["reason"]))
    assert (refusal["reason"], late["reason"]) == ("cancelled", "run_timeout")


def test_the_halves_of_a_batch_that_failed(bench: Callable[..., Bench]) -> None:
    """`table` looks rows up: one beyond its end fails the run, and only its request is answered with an error."""
    b = bench(models.table(8), max_batch_rows=64)
    recorder = recorded(b)
    with b.worker._lock:  # so that all four are one batch
        requests = [b.request(np.array([[i]], np.int64), id=str(i)) for i in (1, 2, 99, 3)]
        assert b.admission.admit(4, sum(r.nbytes for r in requests)) is None
        assert not b.worker.queue.offer(requests, requests[0].arrival)
    b.worker.run_pending()
    b.sink.wait(requests)
    b.settled()
    (batch,) = batches(recorder)
    assert batch["matrices"] == [4, 2, 2, 1, 1] and (batch["requests"], batch["answered"]) == (4, 3)
    assert [(r["id"], r.get("status")) for r in batch["each"]] == [
        ("1", None), ("2", None), ("99", "INVALID_ARGUMENT"), ("3", None)
    ]  # fmt: skip


def test_more_requests_than_are_kept_one_by_one(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold(), max_batch_rows=512)
    recorder = recorded(b)
    held = b.hold()
    sent = b.submit(*[b.request(np.full((1, 1), -1, np.float32)) for _ in range(300)])
    b.let_go()
    b.sink.wait([held, *sent])
    b.settled()
    batch = batches(recorder)[-1]
    assert (batch["requests"], batch["answered"], len(batch["each"])) == (300, 300, 64)


class Call:
    """What a transport knows a request by; it can be watched."""


class Forgetful(Collector):
    """A reply sink that keeps nothing."""

    def deliver(self, *_: Any) -> None:
        pass


def test_neither_tensors_nor_calls_are_kept_alive(bench: Callable[..., Bench]) -> None:
    b = bench(models.chain(), inline=10.0, max_batch_rows=8)
    recorder = recorded(b)
    calls = []
    for i in range(20):
        request = b.request(rows(1, i), id=f"r{i}", sink=Forgetful())
        request.call = Call()
        calls.append(weakref.ref(request.call))
        b.submit(request)
        del request
        b.settled()
    gc.collect()
    assert [call() for call in calls] == [None] * 20
    assert len(batches(recorder)) == 20
    assert {type(entry) for entry in recorder.batches} == {bytes}
