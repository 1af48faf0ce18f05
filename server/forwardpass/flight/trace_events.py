"""A dump in Chrome's trace event format, which Perfetto (ui.perfetto.dev) and chrome://tracing draw. Pure.

A model version is a process, an instance a thread with its runs and answers, and a request an asynchronous span from
its arrival to its answer. A counter has the requests that wait.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from forwardpass.flight.dump_file import Dump, FlownBatch

RECEIVING = 1000  # the thread number that stands for the thread that received the requests

Event = dict[str, Any]


def as_trace(dump: Dump) -> dict[str, Any]:
    """As JSON has it. Times are in microseconds since the first event; `otherData` has the date of that."""
    keys = sorted({(b.model, b.version) for b in dump.batches} | {(r.model, r.version) for r in dump.refused})
    places = {key: place for place, key in enumerate(keys, 1)}
    events: list[Event] = []
    for (model, version), pid in places.items():
        name = f"{model} {version}".strip() or "no model"
        events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}})
    threads = sorted({(places[b.model, b.version], b.instance) for b in dump.batches})
    for pid, instance in threads:
        label = f"instance {instance}" if instance >= 0 else "receiving thread"
        events.append({"ph": "M", "pid": pid, "tid": _thread(instance), "name": "thread_name", "args": {"name": label}})
    number = 0
    for batch in dump.batches:
        pid = places[batch.model, batch.version]
        events += _runs(batch, pid)
        for event in _requests(batch, pid, number):
            events.append(event)
        number += len(batch.each)
    for key, pid in places.items():
        events += _waiting([b for b in dump.batches if (b.model, b.version) == key], pid)
    for refusal in dump.refused:
        events.append(
            {
                "ph": "i",
                "s": "p",
                "pid": places[refusal.model, refusal.version],
                "tid": 0,
                "ts": _us(refusal.time),
                "name": f"{refusal.reason} ({refusal.requests})",
                "cat": "refused",
            }
        )
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"server": dump.server, "cause": dump.cause, "unix_seconds_at_0": dump.began},
    }


def _runs(batch: FlownBatch, pid: int) -> Iterator[Event]:
    at = {"pid": pid, "tid": _thread(batch.instance), "ph": "X"}
    args = {"closed": batch.closed, "requests": batch.requests, "answered": batch.answered, "matrices": batch.matrices}
    run_ended = min(batch.taken + batch.run, batch.ended)
    steps = (
        (f"run {batch.rows} rows", "run", batch.taken, run_ended),
        ("encode", "answer", run_ended, batch.ended),
        ("deliver", "answer", batch.ended, batch.done),
    )
    for name, kind, start, end in steps:
        yield {**at, "name": name, "cat": kind, "ts": _us(start), "dur": _us(end - start), "args": args}


def _requests(batch: FlownBatch, pid: int, number: int) -> Iterator[Event]:
    for place, request in enumerate(batch.each, number):
        name = request.request_id or f"request {place}"
        args: dict[str, Any] = {"rows": request.rows, "outcome": request.outcome or "OK"}
        if math.isfinite(request.deadline):
            args["deadline_us"] = _us(request.deadline)
        at = {"pid": pid, "tid": 0, "cat": "request", "id": place}
        yield {**at, "ph": "b", "name": name, "ts": _us(request.arrival), "args": args}
        yield {**at, "ph": "b", "name": "queue", "ts": _us(request.arrival)}
        yield {**at, "ph": "e", "name": "queue", "ts": _us(batch.taken)}
        yield {**at, "ph": "e", "name": name, "ts": _us(batch.done)}


def _waiting(batches: list[FlownBatch], pid: int) -> Iterator[Event]:
    """The number of requests in the queue, whenever it changes; of those that were recorded one by one."""
    changes: dict[float, int] = {}
    for batch in batches:
        for request in batch.each:
            changes[request.arrival] = changes.get(request.arrival, 0) + 1
        changes[batch.taken] = changes.get(batch.taken, 0) - len(batch.each)
    waiting = 0
    for moment in sorted(changes):
        waiting += changes[moment]
        yield {"ph": "C", "pid": pid, "name": "waiting", "ts": _us(moment), "args": {"requests": waiting}}


def _thread(instance: int) -> int:
    return instance + 1 if instance >= 0 else RECEIVING


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)
