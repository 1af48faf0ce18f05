"""The server's own bounds: what is in flight is counted to the last byte, and nobody is let in beyond them."""

from __future__ import annotations

import random
import threading

import pytest

from forwardpass.batching.admission import Admission
from forwardpass.errors import Draining, Overloaded, RequestError


def reason(error: RequestError | None) -> str:
    return "" if error is None else error.reason


def test_random_traffic_stays_within_the_bounds_and_comes_back_to_nothing() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        admission = Admission(rng.choice((1, 10, 100)), rng.choice((1, 1000, 5000)))
        inside: list[tuple[int, int]] = []
        for _ in range(100):
            if rng.random() < 0.6:
                group = rng.randint(1, 20), rng.choice((0, 1, 100, 900, 3000))
                before = admission.requests, admission.nbytes
                error = admission.admit(*group)
                if error is None:
                    inside.append(group)
                else:
                    assert (admission.requests, admission.nbytes) == before
                    assert isinstance(error, Overloaded) and error.retry_after is not None
            elif inside:
                admission.release(*inside.pop(rng.randrange(len(inside))))
            assert admission.requests == sum(count for count, _ in inside) <= admission.max_requests
            assert admission.nbytes == sum(nbytes for _, nbytes in inside)
            assert admission.nbytes <= admission.max_bytes or admission.requests == 1
        for group in inside:
            admission.release(*group)
        assert (admission.requests, admission.nbytes) == (0, 0)


@pytest.mark.parametrize(
    ("held", "asked", "expected"),
    [
        (None, (10, 100), ""),
        (None, (11, 1), "server_requests"),
        ((9, 0), (1, 0), ""),
        ((9, 0), (2, 0), "server_requests"),
        ((1, 60), (1, 40), ""),
        ((1, 60), (1, 41), "server_bytes"),
        (None, (1, 1 << 40), ""),  # alone, whatever its size: a bound must not make a request impossible
        (None, (2, 101), "server_bytes"),  # several are taken one by one
    ],
)
def test_each_bound_has_its_own_refusal(held: tuple[int, int] | None, asked: tuple[int, int], expected: str) -> None:
    admission = Admission(10, 100)
    if held is not None:
        assert admission.admit(*held) is None
    assert reason(admission.admit(*asked)) == expected


def test_a_closed_door_refuses_everybody_and_still_counts_down() -> None:
    admission = Admission(10, 100)
    assert admission.admit(1, 5) is None
    admission.close()
    assert isinstance(admission.admit(1, 1), Draining)
    assert not admission.wait_empty(0.0)
    admission.release(1, 5)
    assert admission.wait_empty(0.0)


def test_waiting_ends_when_the_last_one_is_released() -> None:
    admission = Admission(10, 100)
    admission.admit(2, 0)
    done: list[bool] = []
    waiter = threading.Thread(target=lambda: done.append(admission.wait_empty(30)))
    waiter.start()
    admission.release(1, 0)
    assert waiter.is_alive()
    admission.release(1, 0)
    waiter.join(30)
    assert done == [True]


def test_many_threads_lose_no_count() -> None:
    admission = Admission(1000, 1 << 30)

    def work() -> None:
        for _ in range(2000):
            assert admission.admit(1, 3) is None
            admission.release(1, 3)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (admission.requests, admission.nbytes) == (0, 0)
