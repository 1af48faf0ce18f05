"""Large requests in a worker with a real network: their answers are the bits of today's slices, whatever else runs, and
a turn's failure, a cancellation or a deadline settles the whole of one."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.service import models
from tests.unit.batching.bench import LONG, Bench, reason, rows, wait_until
from tests.unit.made import read

from forwardpass.errors import InvalidRequest
from forwardpass.inference.request import AnyRequest

SLICE = 16


def sliced(b: Bench, x: NDArray[Any]) -> NDArray[Any]:
    """The outputs of the slices, run by themselves."""
    return np.concatenate([b.session.run([x[i : i + SLICE]], (0,))[0] for i in range(0, len(x), SLICE)])


@pytest.mark.parametrize("inline", [0.0, 10.0], ids=["threads", "inline"])
@pytest.mark.parametrize("instances", [1, 3])
def test_answers_are_the_bits_of_the_slices(bench: Callable[..., Bench], inline: float, instances: int) -> None:
    b = bench(models.chain(), inline=inline, instances=instances, max_batch_rows=SLICE)
    b.worker.queue.run_time.observe(SLICE, 1.0)  # turns of one slice
    sent: list[tuple[AnyRequest, NDArray[Any]]] = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for i in range(12):
            x = rows(rng.choice((1, 1, 3, SLICE + 1, 5 * SLICE, 20 * SLICE + 7)), 1000 * seed + i)
            (request,) = b.submit(b.request(x, timings=True))
            sent.append((request, x))

    clients = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    for answer, (request, x) in zip(b.sink.wait([r for r, _ in sent]), sent, strict=True):
        assert isinstance(answer, bytes)
        assert np.array_equal(read(answer)[1][0], sliced(b, x))
        timing = b.sink.timings[request.call]
        assert timing is not None and (timing.rows == len(x) or len(x) <= SLICE)
    b.settled()
    assert b.counted() == {"OK": len(sent)}
    assert b.metrics.rows == sum(len(x) for _, x in sent)
    assert sum(b.metrics.stages["queue"].counts) == len(sent)


def held_large(b: Bench, slices: int) -> tuple[AnyRequest, AnyRequest]:
    """A large request behind a run that holds the only instance; after it, each turn is short."""
    b.worker.queue.run_time.observe(SLICE, 1.0)
    held = b.hold()
    (request,) = b.submit(b.request(np.zeros((slices * SLICE, 1), np.float32)))
    return held, request


def test_single_rows_go_between_the_turns(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold(), max_batch_rows=SLICE)
    b.worker.queue.run_time.observe(SLICE, 1.0)
    x = np.zeros((6 * SLICE, 1), np.float32)
    x[0], x[SLICE] = LONG, LONG  # its first two turns last until they are ended
    (bulk,) = b.submit(b.request(x))
    wait_until(lambda: b.worker.queue.running_requests == 1)
    singles = b.submit(*(b.request(np.zeros((1, 1), np.float32)) for _ in range(3)))
    b.let_go()  # the first turn fails: the request is settled, and has no second one
    assert reason(b.sink.wait([bulk])[0]) == "run_timeout"
    assert all(isinstance(answer, bytes) for answer in b.sink.wait(singles))
    b.settled()
    assert b.worker._runs.running == {}


def test_a_large_request_does_not_fill_the_queue_for_others(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold(), max_batch_rows=SLICE, rows=2 * SLICE)
    held, bulk = held_large(b, 100)
    (other,) = b.submit(b.request(np.ones((SLICE, 1), np.float32)))
    assert (b.worker.queue.waiting_rows, len(b.worker.queue)) == (101 * SLICE, 2)
    b.let_go()
    assert reason(b.sink.wait([held])[0]) == "run_timeout"
    answers = b.sink.wait([bulk, other])
    assert all(isinstance(answer, bytes) for answer in answers)
    b.settled()


@pytest.mark.parametrize("began", [False, True])
def test_a_cancelled_one_has_no_further_turns(bench: Callable[..., Bench], began: bool) -> None:
    b = bench(models.hold(), max_batch_rows=SLICE)
    if began:
        b.worker.queue.run_time.observe(SLICE, 1.0)
        x = np.zeros((6 * SLICE, 1), np.float32)
        x[0] = LONG
        (bulk,) = b.submit(b.request(x))
        wait_until(lambda: b.worker.queue.running_requests == 1)
        b.worker.cancel(bulk)
        assert not b.worker.queue.large.requests
        b.let_go()
    else:
        held, bulk = held_large(b, 6)
        b.worker.cancel(bulk)
        b.let_go()
        b.sink.wait([held])
    b.worker.cancel(bulk)  # settled before
    b.settled()
    assert bulk.call not in b.sink.answers
    assert b.counted()["CANCELLED"] == 1
    assert b.metrics.rows <= SLICE + 1, "rows ran that nobody waits for"


def test_a_turn_that_fails_settles_the_whole_and_no_other(bench: Callable[..., Bench]) -> None:
    b = bench(models.table(), instances=2, max_batch_rows=SLICE)
    b.worker.queue.run_time.observe(SLICE, 1.0)
    good = np.ones((10 * SLICE, 1), np.int64)
    bad = good.copy()
    bad[7 * SLICE] = 10**6  # beyond the table
    requests = b.submit(b.request(bad), b.request(good), b.request(bad[:-1]))
    first, second, third = b.sink.wait(requests)
    assert isinstance(first, InvalidRequest) and isinstance(third, InvalidRequest)
    assert isinstance(second, bytes)
    assert np.array_equal(read(second)[1][0], np.concatenate([b.session.run([good[:SLICE]], (0,))[0]] * 10))
    b.settled()
    assert b.counted() == {"INVALID_ARGUMENT": 2, "OK": 1}


def test_closing_refuses_what_has_turns_left(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold(), max_batch_rows=SLICE)
    b.worker.queue.run_time.observe(SLICE, 1.0)
    x = np.zeros((6 * SLICE, 1), np.float32)
    x[0] = LONG
    (bulk,) = b.submit(b.request(x))
    wait_until(lambda: b.worker.queue.running_requests == 1)
    assert not b.worker.close(0.05)
    assert reason(b.sink.wait([bulk])[0]) == "unloading"
    b.let_go()
    b.settled()


def test_a_large_request_keeps_all_instances_busy(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold(), instances=3, max_batch_rows=SLICE)
    b.worker.queue.run_time.observe(SLICE, 1.0)
    (bulk,) = b.submit(b.request(np.full((3 * SLICE, 1), LONG, np.float32)))
    wait_until(lambda: b.worker.queue.running_requests == 3)
    b.let_go()
    assert reason(b.sink.wait([bulk])[0]) == "run_timeout"
    b.settled()


def test_text_and_several_outputs_are_joined(bench: Callable[..., Bench]) -> None:
    b = bench(models.echo(models.STRING), max_batch_rows=SLICE)
    b.worker.queue.run_time.observe(SLICE, 1.0)
    words = np.array([f"w{i}" * (i % 3) for i in range(2 * 5 * SLICE)], object).reshape(-1, 2)
    (answer,) = b.sink.wait(b.submit(b.request(words)))
    small = b.request(words[:1])
    assert isinstance(answer, bytes)
    assert [bytes(v) for v in read(answer)[1][0].ravel()] == [w.encode() for w in words.ravel()]
    (first,) = b.sink.wait(b.submit(small))
    assert isinstance(first, bytes)
    b.settled()
    two = bench(models.two_by_two(), max_batch_rows=SLICE)
    two.worker.queue.run_time.observe(SLICE, 1.0)
    a, n = rows(5 * SLICE, width=3), np.arange(5 * SLICE).reshape(-1, 1)
    (answer,) = two.sink.wait(two.submit(two.request(a, n, outputs=(2, 0))))
    assert isinstance(answer, bytes)
    n_out, total = read(answer)[1]
    assert np.array_equal(n_out, n) and np.array_equal(total, a + n.astype(np.float32))
    two.settled()
