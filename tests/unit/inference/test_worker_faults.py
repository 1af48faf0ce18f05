"""A worker when something goes wrong: the culprit alone is told, and nobody waits for ever."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from tests.service import models
from tests.unit.batching.bench import LONG, Bench, reason, rows, wait_until
from tests.unit.made import Collector, read

from forwardpass.batching.request import SETTLED
from forwardpass.errors import DeadlineExceeded, InvalidRequest, RunFailed
from forwardpass.inference.request import AnyRequest
from forwardpass.observability import log_limit
from forwardpass.protocol.timings import BatchTiming
from forwardpass.transport.interface import Answer


@pytest.mark.parametrize("bad", [[5], [0], [15], [3, 11], [4, 5], list(range(16))])
def test_one_bad_request_does_not_fail_its_neighbours(bench: Callable[..., Bench], bad: list[int]) -> None:
    b = bench(models.table(), inline=10.0)
    requests = [b.request(np.array([[99 if i in bad else i % 8]])) for i in range(16)]
    b.submit(*requests)
    for i, answer in enumerate(b.sink.wait(requests)):
        if i in bad:
            assert isinstance(answer, InvalidRequest) and "idx=99" in str(answer)
        else:
            assert isinstance(answer, bytes) and read(answer)[1][0].tolist() == [[10.0 * (i % 8)]]
    b.settled()
    counted = b.counted()
    assert (counted.get("OK", 0), counted["INVALID_ARGUMENT"]) == (16 - len(bad), len(bad))
    assert b.metrics.isolated >= 4


def test_a_cancelled_request_never_runs(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold())
    held = b.hold()
    stays, goes = b.submit(*(b.request(np.array([[-i]], np.float32)) for i in range(2)))
    b.worker.cancel(goes)
    b.worker.cancel(goes)  # twice is once
    b.let_go()
    b.sink.wait([held, stays])
    b.settled()
    assert goes.call not in b.sink.answers
    assert b.counted() == {"DEADLINE_EXCEEDED": 1, "OK": 1, "CANCELLED": 1}
    assert b.metrics.rows == 2  # the held one and the one that stayed


def test_a_request_cancelled_while_it_runs_is_not_answered_and_its_neighbour_is(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold())
    first = b.hold()
    stays, goes = b.submit(*(b.request(np.array([[LONG]], np.float32)) for _ in range(2)))
    b.let_go()
    b.sink.wait([first])
    wait_until(lambda: b.worker.queue.running_requests == 2)
    b.worker.cancel(goes)
    b.let_go()
    b.sink.wait([stays])
    b.settled()
    assert goes.call not in b.sink.answers
    assert b.counted() == {"DEADLINE_EXCEEDED": 2, "CANCELLED": 1}


def test_what_expires_in_the_queue_is_never_run(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold())
    held = b.hold()
    late, patient = b.submit(
        b.request(np.zeros((3, 1), np.float32), seconds=0.02), b.request(np.zeros((1, 1), np.float32))
    )
    wait_until(lambda: time.monotonic() > late.deadline)
    b.let_go()
    answers = b.sink.wait([held, late, patient])
    assert isinstance(answers[1], DeadlineExceeded) and reason(answers[1]) == "deadline_expired"
    assert isinstance(answers[2], bytes)
    b.settled()
    assert b.counted() == {"DEADLINE_EXCEEDED": 2, "OK": 1}
    assert b.metrics.rows == 2 and b.metrics.reasons["deadline_expired"] == 1


def test_an_answer_after_the_deadline_is_none(bench: Callable[..., Bench]) -> None:
    b = bench(models.echo())
    # On this clock a run takes more than a minute.
    b.worker._clock = lambda: time.monotonic() + 100 * b.worker.queue.running_requests
    late, patient = b.submit(b.request(rows(1, width=2), seconds=60), b.request(rows(1, width=2)))
    answers = b.sink.wait([late, patient])
    assert isinstance(answers[0], DeadlineExceeded) and reason(answers[0]) == "deadline_late"
    assert isinstance(answers[1], bytes)
    b.settled()
    assert b.counted() == {"DEADLINE_EXCEEDED": 1, "OK": 1}


@pytest.mark.parametrize("inline", [0.0, 10.0], ids=["threads", "inline"])
def test_a_run_that_takes_too_long_is_ended(bench: Callable[..., Bench], inline: float) -> None:
    b = bench(models.hold(), inline=inline)
    assert b.worker.end_runs_since(float("inf")) == 0
    watchdog = threading.Thread(target=b.let_go)
    watchdog.start()
    requests = b.submit(b.request(np.array([[LONG]], np.float32)), b.request(np.array([[1.0]], np.float32)))
    answers = b.sink.wait(requests)
    watchdog.join()
    assert [reason(a) for a in answers] == ["run_timeout", "run_timeout"]
    (after,) = b.submit(b.request(np.array([[3.0]], np.float32)))
    assert isinstance(b.sink.wait([after])[0], bytes)
    b.settled()


def test_what_nobody_foresaw_is_an_error_for_each_and_the_worker_lives(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    b = bench(models.chain(), inline=10.0)
    broken, sound = b.request(rows(2)), b.request(rows(2))
    broken.buffers = (b"not its rows",)
    with caplog.at_level(logging.ERROR):
        answers = b.sink.wait(b.submit(broken, sound))
    assert all(isinstance(a, RunFailed) for a in answers)
    assert "Traceback" not in str(answers[0]) and "internal error" in str(answers[0])
    assert "ValueError" in caplog.text
    (after,) = b.submit(b.request(rows(1)))
    assert isinstance(b.sink.wait([after])[0], bytes)
    b.settled()


class Broken(Collector):
    def deliver(self, requests: Sequence[AnyRequest], answers: Sequence[Answer], timing: BatchTiming | None) -> None:
        raise OSError("the transport is gone")


@pytest.mark.parametrize("inline", [0.0, 10.0], ids=["threads", "inline"])
def test_a_door_that_fails_takes_nobody_with_it(
    bench: Callable[..., Bench], inline: float, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_limit, "SECONDS", 0.0)  # the same line was logged by the test before
    b = bench(models.chain(), inline=inline)
    broken = Broken()
    for _ in range(3):
        requests = [b.request(rows(1), sink=broken), b.request(rows(1)), b.request(rows(1), sink=broken)]
        assert isinstance(b.sink.wait(b.submit(*requests)[1:2])[0], bytes)
        one = b.request(rows(1), sink=broken)
        assert b.admission.admit(1, one.nbytes) is None
        if not b.worker.try_run_now(one, time.monotonic()):
            b.worker.submit([one], time.monotonic())
            while b.worker.run_pending():
                pass
    b.submit(b.request(rows(1), sink=broken, seconds=-1.0))  # refused, through the same transport
    b.settled()
    assert "the transport is gone" in caplog.text


@pytest.mark.parametrize("seed", range(4))
def test_a_storm_of_everything_leaves_nobody_without_an_answer(bench: Callable[..., Bench], seed: int) -> None:
    b = bench(
        models.table(),
        inline=10.0 * (seed % 2),
        instances=1 + seed // 2,
        max_batch_rows=8,
        requests=20,
        rows=30,
        nbytes=500,
    )
    all_sent: list[AnyRequest] = []

    def client(number: int) -> None:
        rng = random.Random(100 * seed + number)
        mine: list[AnyRequest] = []
        for _ in range(60):
            for _ in range(rng.randint(1, 6)):
                x = np.array([[rng.choice((0, 1, 7, 99))]] * rng.choice((0, 1, 1, 3, 20)), np.int64).reshape(-1, 1)
                mine.append(b.request(x, seconds=rng.choice((None, None, -0.1, 0.0, 0.001, 1.0))))
                before[mine[-1].call] = x.tobytes()
            group = mine[-rng.randint(1, 3) :]
            b.submit(*(r for r in group if r.state == 0))
            if rng.random() < 0.4:
                victim = rng.choice(mine)
                if victim.state:
                    b.worker.cancel(victim)
                    gone.add(victim.call)
        all_sent.extend(r for r in mine if r.state)

    gone: set[int] = set()
    before: dict[int, bytes] = {}
    clients = [threading.Thread(target=client, args=(i,)) for i in range(3)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    b.sink.wait([r for r in all_sent if r.call not in gone])
    b.settled()
    assert all(r.state == SETTLED for r in all_sent)
    assert all(len(answers) == 1 for answers in b.sink.answers.values())
    assert sum(b.counted().values()) == len(all_sent)
    assert len(b.sink.answers) == len(all_sent) - b.counted().get("CANCELLED", 0)
    asked = {r.call: np.frombuffer(before[r.call], np.int64) for r in all_sent}
    right = [(call, a) for call, (a,) in b.sink.answers.items() if isinstance(a, bytes)]
    assert right
    assert all(np.array_equal(read(a)[1][0].ravel(), 10.0 * asked[call]) for call, a in right)
