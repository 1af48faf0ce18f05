"""A worker with a real network behind it: every request is answered exactly once, with its own rows, come what may."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from tests.service import models
from tests.unit.serving.made import Collector, Target, read, request_for, session

from forwardpass.errors import DeadlineExceeded, InvalidRequest, ModelLoading, RequestError, RunFailed
from forwardpass.serving.admission import Admission
from forwardpass.serving.metrics import ModelMetrics
from forwardpass.serving.request import SETTLED, Limits, Request
from forwardpass.serving.run_time import RunTime
from forwardpass.serving.worker import Answer, Options, Timing, Worker

LONG = 1e12  # turns of `hold`: a run that does not end by itself


class Bench:
    """A worker, its doors, and what it was sent."""

    def __init__(self, model: onnx.ModelProto, folder: Path, inline: float = 0.0, **limits: Any) -> None:
        options = {k: limits.pop(k) for k in ("instances", "row_independent") if k in limits}
        self.session = session(model, folder)
        self.admission = Admission(100_000, 1 << 30)
        self.metrics = ModelMetrics("m", "1")
        self.door = Collector()
        self.worker = Worker(
            "m",
            "1",
            self.session,
            self.session.interface,
            Options(Limits(**limits), inline_run_limit=inline, **options),
            RunTime(),
            self.metrics,
            self.admission,
        )
        self.target = Target(self.session.interface)
        self.worker.start()

    def request(self, *arrays: NDArray[Any], seconds: float | None = None, **more: Any) -> Request:
        now = time.monotonic()
        deadline = now + seconds if seconds is not None else float("inf")
        return request_for(
            self.target, arrays, door=more.pop("door", self.door), arrival=now, deadline=deadline, **more
        )

    def submit(self, *requests: Request) -> tuple[Request, ...]:
        """As a door's intake does: admit, submit, and step until nothing is left for this thread."""
        assert self.admission.admit(len(requests), sum(r.nbytes for r in requests)) is None
        self.worker.submit(requests, time.monotonic())
        while self.worker.step():
            pass
        return requests

    def hold(self, turns: float = LONG) -> Request:
        """Keep the only instance busy; returns once the run has begun."""
        (held,) = self.submit(self.request(np.array([[turns]], np.float32)))
        wait_until(lambda: bool(self.worker.queue.running_requests))
        return held

    def let_go(self) -> None:
        """End whatever runs now."""
        wait_until(lambda: bool(self.worker.end_runs_since(float("inf"))))

    def settled(self) -> None:
        """Nothing is left anywhere."""
        wait_until(lambda: self.admission.requests == 0)
        queue = self.worker.queue
        assert (queue.requests, queue.rows, queue.nbytes) == (0, 0, 0)
        assert (queue.running_requests, self.admission.nbytes) == (0, 0)

    def counted(self) -> dict[str, int]:
        """Requests by status."""
        with self.metrics._lock:
            self.metrics._fold()
            return dict(self.metrics.codes)


def wait_until(there: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(model: onnx.ModelProto, **more: Any) -> Bench:
        made.append(Bench(model, tmp_path, **more))
        return made[-1]

    yield make
    for one in made:
        one.worker.end_runs_since(float("inf"))
        assert one.worker.close(10.0), "a thread is left"


def rows(count: int, seed: int = 0, width: int = 4) -> NDArray[Any]:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def reason(answer: Answer) -> str:
    return answer.reason if isinstance(answer, RequestError) else "answered"


@pytest.mark.parametrize("inline", [0.0, 10.0], ids=["threads", "inline"])
@pytest.mark.parametrize("instances", [1, 3])
def test_every_answer_is_what_the_network_says_of_those_rows(
    bench: Callable[..., Bench], inline: float, instances: int
) -> None:
    b = bench(models.chain(), inline=inline, instances=instances, max_batch_rows=16)
    sent: list[tuple[Request, NDArray[Any]]] = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for i in range(30):
            xs = [rows(rng.choice((0, 1, 1, 2, 5, 40)), 1000 * seed + 10 * i + j) for j in range(rng.randint(1, 4))]
            requests = [b.request(x) for x in xs]
            sent.extend(zip(requests, xs, strict=True))
            b.submit(*requests)

    clients = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    for answer, (_, x) in zip(b.door.wait([r for r, _ in sent]), sent, strict=True):
        assert isinstance(answer, bytes)
        _, (y,) = read(answer)
        assert np.array_equal(y, b.session.run([x], (0,))[0])
    b.settled()
    assert b.counted() == {"OK": len(sent)}


def test_what_gathers_during_a_run_makes_one_batch(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold(), max_batch_rows=64)
    held = b.hold()
    sent = [b.submit(b.request(np.array([[-i]], np.float32), timings=True))[0] for i in range(20)]
    b.let_go()
    b.door.wait([held, *sent])
    timings = {b.door.timings[r.call] for r in sent}
    assert [t.rows for t in timings if t is not None] == [20]
    b.settled()


@pytest.mark.parametrize("bad", [[5], [0], [15], [3, 11], [4, 5], list(range(16))])
def test_one_bad_request_does_not_fail_its_neighbours(bench: Callable[..., Bench], bad: list[int]) -> None:
    b = bench(models.table(), inline=10.0)
    requests = [b.request(np.array([[99 if i in bad else i % 8]])) for i in range(16)]
    b.submit(*requests)
    for i, answer in enumerate(b.door.wait(requests)):
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
    b.door.wait([held, stays])
    b.settled()
    assert goes.call not in b.door.answers
    assert b.counted() == {"DEADLINE_EXCEEDED": 1, "OK": 1, "CANCELLED": 1}
    assert b.metrics.rows == 2  # the held one and the one that stayed


def test_a_request_cancelled_while_it_runs_is_not_answered_and_its_neighbour_is(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold())
    first = b.hold()
    stays, goes = b.submit(*(b.request(np.array([[LONG]], np.float32)) for _ in range(2)))
    b.let_go()
    b.door.wait([first])
    wait_until(lambda: b.worker.queue.running_requests == 2)
    b.worker.cancel(goes)
    b.let_go()
    b.door.wait([stays])
    b.settled()
    assert goes.call not in b.door.answers
    assert b.counted() == {"DEADLINE_EXCEEDED": 2, "CANCELLED": 1}


def test_what_expires_in_the_queue_is_never_run(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold())
    held = b.hold()
    late, patient = b.submit(
        b.request(np.zeros((3, 1), np.float32), seconds=0.02), b.request(np.zeros((1, 1), np.float32))
    )
    wait_until(lambda: time.monotonic() > late.deadline)
    b.let_go()
    answers = b.door.wait([held, late, patient])
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
    answers = b.door.wait([late, patient])
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
    answers = b.door.wait(requests)
    watchdog.join()
    assert [reason(a) for a in answers] == ["run_timeout", "run_timeout"]
    (after,) = b.submit(b.request(np.array([[3.0]], np.float32)))
    assert isinstance(b.door.wait([after])[0], bytes)
    b.settled()


class Threads(Collector):
    """A door that also remembers who brought the answers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def deliver(self, requests: Sequence[Request], answers: Sequence[Answer], timing: Timing | None) -> None:
        self.seen.add(threading.get_ident())
        super().deliver(requests, answers, timing)


@pytest.mark.parametrize(("inline", "here"), [(10.0, True), (0.0, False)])
def test_short_runs_are_made_by_whoever_received_the_request(
    bench: Callable[..., Bench], inline: float, here: bool
) -> None:
    b = bench(models.chain(), inline=inline)
    door = Threads()
    door.wait(b.submit(*(b.request(rows(1), door=door) for _ in range(3))))
    assert door.seen == {threading.get_ident()} if here else threading.get_ident() not in door.seen
    one = b.request(rows(1), door=door)
    assert b.admission.admit(1, one.nbytes) is None
    assert b.worker.alone(one, time.monotonic()) is here
    if not here:
        b.worker.submit([one], time.monotonic())
        b.worker.step()
    door.wait([one])
    b.settled()


def test_a_lone_request_does_not_overtake_those_that_wait(bench: Callable[..., Bench]) -> None:
    b = bench(models.chain(), inline=10.0)
    first, second = b.request(rows(1)), b.request(rows(1))
    assert b.admission.admit(2, first.nbytes + second.nbytes) is None
    b.worker.submit([first], time.monotonic())
    assert not b.worker.alone(second, time.monotonic())
    b.worker.submit([second], time.monotonic())
    assert not b.worker.step()
    b.door.wait([first, second])
    b.settled()


def test_nobody_runs_beside_a_lone_request(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold(), inline=10.0)
    held, other = b.request(np.array([[LONG]], np.float32)), b.request(np.zeros((1, 1), np.float32))
    assert b.admission.admit(2, held.nbytes + other.nbytes) is None
    runs = threading.Thread(target=b.worker.alone, args=(held, time.monotonic()))
    runs.start()
    wait_until(lambda: bool(b.worker._running))
    b.worker.submit([other], time.monotonic())
    assert not b.worker.step()  # whoever holds the slot comes back for it
    assert other.call not in b.door.answers
    b.let_go()
    runs.join()
    assert not b.worker.step()
    assert isinstance(b.door.wait([held, other])[1], bytes)
    b.settled()


def test_every_instance_gets_to_work(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold(), instances=3, max_batch_rows=1)
    held = b.submit(*(b.request(np.array([[LONG]], np.float32)) for _ in range(4)))
    wait_until(lambda: b.worker.queue.running_requests == 3)
    b.let_go()
    wait_until(lambda: not b.worker.queue.requests)
    b.let_go()
    b.door.wait(held)
    b.settled()


def test_what_a_door_leaves_behind_is_run_before_the_end(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold(), inline=10.0)
    held, left = b.request(np.array([[LONG]], np.float32)), b.request(np.zeros((1, 1), np.float32))
    assert b.admission.admit(2, held.nbytes + left.nbytes) is None
    runs = threading.Thread(target=b.worker.alone, args=(held, time.monotonic()))
    runs.start()
    wait_until(lambda: bool(b.worker._running))
    b.worker.submit([left], time.monotonic())  # and no step: that door is going as well
    closes = threading.Thread(target=b.worker.close, args=(20.0,))
    closes.start()
    wait_until(lambda: b.worker._ending)
    b.let_go()
    closes.join()
    runs.join()
    assert isinstance(b.door.wait([left])[0], bytes)
    b.settled()


def test_a_run_predicted_to_be_long_is_handed_over(bench: Callable[..., Bench]) -> None:
    b = bench(models.chain(), inline=1e-3)
    b.worker.queue.run_time.observe(1, 0.5)
    door = Threads()
    one = b.request(rows(1), door=door)
    assert b.admission.admit(1, one.nbytes) is None
    assert not b.worker.alone(one, time.monotonic())
    b.admission.release(1, one.nbytes)
    door.wait(b.submit(one))
    assert threading.get_ident() not in door.seen


def test_what_nobody_foresaw_is_an_error_for_each_and_the_worker_lives(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    b = bench(models.chain(), inline=10.0)
    broken, sound = b.request(rows(2)), b.request(rows(2))
    broken.buffers = (b"not its rows",)
    with caplog.at_level(logging.ERROR):
        answers = b.door.wait(b.submit(broken, sound))
    assert all(isinstance(a, RunFailed) for a in answers)
    assert "Traceback" not in str(answers[0]) and "internal error" in str(answers[0])
    assert "ValueError" in caplog.text
    (after,) = b.submit(b.request(rows(1)))
    assert isinstance(b.door.wait([after])[0], bytes)
    b.settled()


class Broken(Collector):
    def deliver(self, requests: Sequence[Request], answers: Sequence[Answer], timing: Timing | None) -> None:
        raise OSError("the transport is gone")


@pytest.mark.parametrize("inline", [0.0, 10.0], ids=["threads", "inline"])
def test_a_door_that_fails_takes_nobody_with_it(
    bench: Callable[..., Bench], inline: float, caplog: pytest.LogCaptureFixture
) -> None:
    b = bench(models.chain(), inline=inline)
    broken = Broken()
    for _ in range(3):
        requests = [b.request(rows(1), door=broken), b.request(rows(1)), b.request(rows(1), door=broken)]
        assert isinstance(b.door.wait(b.submit(*requests)[1:2])[0], bytes)
        one = b.request(rows(1), door=broken)
        assert b.admission.admit(1, one.nbytes) is None
        if not b.worker.alone(one, time.monotonic()):
            b.worker.submit([one], time.monotonic())
            while b.worker.step():
                pass
    b.submit(b.request(rows(1), door=broken, seconds=-1.0))  # refused, through the same door
    b.settled()
    assert "the transport is gone" in caplog.text


def test_each_door_gets_its_own(bench: Callable[..., Bench]) -> None:
    b = bench(models.chain(), inline=10.0)
    doors = [Collector(), Collector(), Collector()]
    requests = [b.request(rows(1, i), door=doors[i % 3]) for i in range(9)]
    b.submit(*requests)
    for i, door in enumerate(doors):
        door.wait(requests[i::3])
        assert set(door.answers) == {r.call for r in requests[i::3]}


def test_different_widths_never_share_a_matrix(bench: Callable[..., Bench]) -> None:
    b = bench(models.relu_any_width(), inline=10.0)
    xs = [rows(1, i, width=2 + i % 3) for i in range(30)]
    requests = [b.request(x) for x in xs]
    for answer, x in zip(b.door.wait(b.submit(*requests)), xs, strict=True):
        assert isinstance(answer, bytes)
        assert np.array_equal(read(answer)[1][0], np.maximum(x, 0))
    with b.metrics._lock:
        b.metrics._fold()
    assert (b.metrics.batches, b.metrics.rows) == (3, 30)


def test_closing_finishes_what_waits_and_takes_no_more(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold())
    held = b.hold(2e4)
    waiting = b.submit(*(b.request(np.array([[1.0]], np.float32)) for _ in range(5)))
    assert b.worker.close(20.0)
    assert all(isinstance(a, bytes) for a in b.door.wait([held, *waiting]))
    late = b.submit(b.request(np.array([[1.0]], np.float32)))
    (answer,) = b.door.wait(late)
    assert isinstance(answer, ModelLoading) and reason(answer) == "unloading"
    b.settled()


def test_closing_does_not_wait_for_ever(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold())
    held = b.hold()
    waiting = b.submit(*(b.request(np.array([[1.0]], np.float32)) for _ in range(5)))
    assert not b.worker.close(0.05)
    assert {reason(a) for a in b.door.wait(waiting)} == {"unloading"}
    b.let_go()
    assert reason(b.door.wait([held])[0]) == "run_timeout"
    b.settled()


def test_a_delay_gathers_a_batch_and_ends(bench: Callable[..., Bench]) -> None:
    b = bench(models.echo(), delay=0.05, max_batch_rows=8)
    requests = [b.submit(b.request(rows(1, i, 2), timings=True))[0] for i in range(3)]
    b.door.wait(requests)
    assert {t.rows for r in requests if (t := b.door.timings[r.call]) is not None} == {3}
    full = [b.submit(b.request(rows(4, i, 2)))[0] for i in range(2)]  # does not wait
    b.door.wait(full)
    b.settled()


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
    all_sent: list[Request] = []

    def client(number: int) -> None:
        rng = random.Random(100 * seed + number)
        mine: list[Request] = []
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
    b.door.wait([r for r in all_sent if r.call not in gone])
    b.settled()
    assert all(r.state == SETTLED for r in all_sent)
    assert all(len(answers) == 1 for answers in b.door.answers.values())
    assert sum(b.counted().values()) == len(all_sent)
    assert len(b.door.answers) == len(all_sent) - b.counted().get("CANCELLED", 0)
    asked = {r.call: np.frombuffer(before[r.call], np.int64) for r in all_sent}
    right = [(call, a) for call, (a,) in b.door.answers.items() if isinstance(a, bytes)]
    assert right
    assert all(np.array_equal(read(a)[1][0].ravel(), 10.0 * asked[call]) for call, a in right)


def test_timings_are_whole_microseconds() -> None:
    timing = Timing(taken=10.0005, run=0.00025, done=10.001, rows=7)
    assert timing.trailers(10.0) == [
        ("forwardpass-queue-us", "500"),
        ("forwardpass-run-us", "250"),
        ("forwardpass-total-us", "1000"),
        ("forwardpass-batch-rows", "7"),
    ]
