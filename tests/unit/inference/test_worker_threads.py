"""A model's threads: none before there is something to do for them, none once there is not for long."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.service import models
from tests.unit.batching.bench import LONG, Bench, rows, wait_until

from forwardpass.inference import worker_threads


def alive(b: Bench) -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith(f"{b.worker.name}/{b.worker.version}#")}


def test_a_model_has_no_thread_before_its_first_request(bench: Callable[..., Bench]) -> None:
    b = bench(models.chain(), inline=0.0)
    assert not alive(b) and b.worker.is_idle
    b.sink.wait(b.submit(b.request(rows(1))))
    assert alive(b) == {"m/1#0"}
    b.settled()


def test_a_model_whose_runs_are_short_never_has_one(bench: Callable[..., Bench]) -> None:
    b = bench(models.chain(), inline=10.0)
    b.sink.wait(b.submit(*(b.request(rows(1, i)) for i in range(5))))
    assert not alive(b)


def test_as_many_are_started_as_there_is_work_for(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold(), instances=3)
    held = [b.submit(b.request(np.array([[LONG]], np.float32)))[0]]
    wait_until(lambda: b.worker.queue.running_requests == 1)
    assert alive(b) == {"m/1#0"}
    for count in (2, 3, 3):
        held += b.submit(b.request(np.array([[LONG]], np.float32)))
        wait_until(lambda count=count: b.worker.queue.running_requests == count)  # type: ignore[misc]
        assert len(alive(b)) == count
    while b.worker.queue.running_requests:
        b.worker.end_runs_since(float("inf"))
    b.sink.wait(held)
    b.settled()


def test_a_thread_ends_once_its_model_is_idle_and_the_next_request_starts_another(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forwardpass.inference.worker.IDLE_SECONDS", 0.01)
    b = bench(models.chain(), inline=0.0)
    for i in range(3):
        b.sink.wait(b.submit(b.request(rows(1, i))))
        wait_until(lambda: not alive(b))
        assert b.worker.is_idle
    b.settled()


def test_requests_that_come_as_a_thread_ends_are_all_answered(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forwardpass.inference.worker.IDLE_SECONDS", 0.0)  # at every chance
    b = bench(models.chain(), inline=0.0, instances=2)
    for i in range(200):
        b.sink.wait(b.submit(b.request(rows(1, i)), b.request(rows(2, i))))
    b.settled()
    assert b.counted() == {"OK": 400}


def test_a_worker_that_has_ended_is_freed_at_once(tmp_path: Path) -> None:
    """And its network with it: the cycle collector seldom runs in a server."""
    b = Bench(models.chain(), tmp_path)
    b.sink.wait(b.submit(b.request(rows(1))))
    assert b.worker.retire(30.0)
    freed = weakref.ref(b.worker)
    gc.disable()
    try:
        del b.worker
        wait_until(lambda: freed() is None)
    finally:
        gc.enable()


def test_a_request_is_run_by_its_own_thread_where_none_can_be_started(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    b = bench(models.chain(), inline=0.0)

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(worker_threads.WorkerThreads, "_start", refuse)
    b.sink.wait(b.submit(b.request(rows(1))))
    assert "model m/1: no thread could be started for its runs: can't start new thread" in caplog.text
    b.settled()
