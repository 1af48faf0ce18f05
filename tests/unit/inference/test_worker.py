"""A worker with a real network behind it: every request is answered exactly once, with its own rows, come what may."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.service import models
from tests.unit.batching.bench import LONG, Bench, reason, rows, wait_until
from tests.unit.made import Collector, read

from forwardpass.errors import ModelLoading
from forwardpass.inference.request import AnyRequest
from forwardpass.protocol.timings import BatchTiming
from forwardpass.transport.interface import Answer


@pytest.mark.parametrize("inline", [0.0, 10.0], ids=["threads", "inline"])
@pytest.mark.parametrize("instances", [1, 3])
def test_every_answer_is_what_the_network_says_of_those_rows(
    bench: Callable[..., Bench], inline: float, instances: int
) -> None:
    b = bench(models.chain(), inline=inline, instances=instances, max_batch_rows=16)
    sent: list[tuple[AnyRequest, NDArray[Any]]] = []

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
    for answer, (_, x) in zip(b.sink.wait([r for r, _ in sent]), sent, strict=True):
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
    b.sink.wait([held, *sent])
    timings = {b.sink.timings[r.call] for r in sent}
    assert [t.rows for t in timings if t is not None] == [20]
    b.settled()


class Threads(Collector):
    """A transport that also remembers who brought the answers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def deliver(self, requests: Sequence[AnyRequest], answers: Sequence[Answer], timing: BatchTiming | None) -> None:
        self.seen.add(threading.get_ident())
        super().deliver(requests, answers, timing)


@pytest.mark.parametrize(("inline", "here"), [(10.0, True), (0.0, False)])
def test_short_runs_are_made_by_whoever_received_the_request(
    bench: Callable[..., Bench], inline: float, here: bool
) -> None:
    b = bench(models.chain(), inline=inline)
    sink = Threads()
    sink.wait(b.submit(*(b.request(rows(1), sink=sink) for _ in range(3))))
    assert sink.seen == {threading.get_ident()} if here else threading.get_ident() not in sink.seen
    one = b.request(rows(1), sink=sink)
    assert b.admission.admit(1, one.nbytes) is None
    assert b.worker.try_run_now(one, time.monotonic()) is here
    if not here:
        b.worker.submit([one], time.monotonic())
        b.worker.run_pending()
    sink.wait([one])
    b.settled()


def test_a_lone_request_does_not_overtake_those_that_wait(bench: Callable[..., Bench]) -> None:
    b = bench(models.chain(), inline=10.0)
    first, second = b.request(rows(1)), b.request(rows(1))
    assert b.admission.admit(2, first.nbytes + second.nbytes) is None
    b.worker.submit([first], time.monotonic())
    assert not b.worker.try_run_now(second, time.monotonic())
    b.worker.submit([second], time.monotonic())
    assert not b.worker.run_pending()
    b.sink.wait([first, second])
    b.settled()


def test_nobody_runs_beside_a_lone_request(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold(), inline=10.0)
    held, other = b.request(np.array([[LONG]], np.float32)), b.request(np.zeros((1, 1), np.float32))
    assert b.admission.admit(2, held.nbytes + other.nbytes) is None
    runs = threading.Thread(target=b.worker.try_run_now, args=(held, time.monotonic()))
    runs.start()
    wait_until(lambda: bool(b.worker._runs.running))
    b.worker.submit([other], time.monotonic())
    assert not b.worker.run_pending()  # whoever holds the slot comes back for it
    assert other.call not in b.sink.answers
    b.let_go()
    runs.join()
    assert not b.worker.run_pending()
    assert isinstance(b.sink.wait([held, other])[1], bytes)
    b.settled()


def test_every_instance_gets_to_work(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold(), instances=3, max_batch_rows=1)
    held = b.submit(*(b.request(np.array([[LONG]], np.float32)) for _ in range(4)))
    wait_until(lambda: b.worker.queue.running_requests == 3)
    b.let_go()
    wait_until(lambda: not b.worker.queue.requests)
    b.let_go()
    b.sink.wait(held)
    b.settled()


def test_what_a_door_leaves_behind_is_run_before_the_end(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold(), inline=10.0)
    held, left = b.request(np.array([[LONG]], np.float32)), b.request(np.zeros((1, 1), np.float32))
    assert b.admission.admit(2, held.nbytes + left.nbytes) is None
    runs = threading.Thread(target=b.worker.try_run_now, args=(held, time.monotonic()))
    runs.start()
    wait_until(lambda: bool(b.worker._runs.running))
    b.worker.submit([left], time.monotonic())  # and no step: that transport is going as well
    closes = threading.Thread(target=b.worker.close, args=(20.0,))
    closes.start()
    wait_until(lambda: b.worker._ending)
    b.let_go()
    closes.join()
    runs.join()
    assert isinstance(b.sink.wait([left])[0], bytes)
    b.settled()


def test_a_run_predicted_to_be_long_is_handed_over(bench: Callable[..., Bench]) -> None:
    b = bench(models.chain(), inline=1e-3)
    b.worker.queue.run_time.observe(1, 0.5)
    sink = Threads()
    one = b.request(rows(1), sink=sink)
    assert b.admission.admit(1, one.nbytes) is None
    assert not b.worker.try_run_now(one, time.monotonic())
    b.admission.release(1, one.nbytes)
    sink.wait(b.submit(one))
    assert threading.get_ident() not in sink.seen


def test_each_door_gets_its_own(bench: Callable[..., Bench]) -> None:
    b = bench(models.chain(), inline=10.0)
    sinks = [Collector(), Collector(), Collector()]
    requests = [b.request(rows(1, i), sink=sinks[i % 3]) for i in range(9)]
    b.submit(*requests)
    for i, sink in enumerate(sinks):
        sink.wait(requests[i::3])
        assert set(sink.answers) == {r.call for r in requests[i::3]}


def test_different_widths_never_share_a_matrix(bench: Callable[..., Bench]) -> None:
    b = bench(models.relu_any_width(), inline=10.0)
    xs = [rows(1, i, width=2 + i % 3) for i in range(30)]
    requests = [b.request(x) for x in xs]
    for answer, x in zip(b.sink.wait(b.submit(*requests)), xs, strict=True):
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
    assert all(isinstance(a, bytes) for a in b.sink.wait([held, *waiting]))
    late = b.submit(b.request(np.array([[1.0]], np.float32)))
    (answer,) = b.sink.wait(late)
    assert isinstance(answer, ModelLoading) and reason(answer) == "unloading"
    b.settled()


def test_closing_does_not_wait_for_ever(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold())
    held = b.hold()
    waiting = b.submit(*(b.request(np.array([[1.0]], np.float32)) for _ in range(5)))
    assert not b.worker.close(0.05)
    assert {reason(a) for a in b.sink.wait(waiting)} == {"unloading"}
    b.let_go()
    assert reason(b.sink.wait([held])[0]) == "run_timeout"
    b.settled()


def test_a_delay_gathers_a_batch_and_ends(bench: Callable[..., Bench]) -> None:
    b = bench(models.echo(), delay=0.05, max_batch_rows=8)
    requests = [b.submit(b.request(rows(1, i, 2), timings=True))[0] for i in range(3)]
    b.sink.wait(requests)
    assert {t.rows for r in requests if (t := b.sink.timings[r.call]) is not None} == {3}
    full = [b.submit(b.request(rows(4, i, 2)))[0] for i in range(2)]  # does not wait
    b.sink.wait(full)
    b.settled()


def test_timings_are_whole_microseconds() -> None:
    timing = BatchTiming(taken=10.0005, run=0.00025, done=10.001, rows=7)
    assert timing.trailers(10.0) == [
        ("forwardpass-queue-us", "500"),
        ("forwardpass-run-us", "250"),
        ("forwardpass-total-us", "1000"),
        ("forwardpass-batch-rows", "7"),
    ]
