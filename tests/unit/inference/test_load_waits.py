"""Calls that wait for a load: how many may, and that each ends once, however it ends."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

from forwardpass.batching.admission import Admission
from forwardpass.errors import ModelUnusable, Reason, RequestError, UnknownModel
from forwardpass.inference.load_waits import HeldCall, LoadWaits

IDS = itertools.count()


class Loads:
    """Loads that a test ends. A real OnDemandLoads that loads nothing."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callable[[RequestError | None], None]]] = {}
        self.refuses: RequestError | None = None

    def begin(
        self, name: str, version: str, error: RequestError, done: Callable[[RequestError | None], None]
    ) -> RequestError | None:
        if self.refuses is None:
            self.waiting.setdefault(name + version, []).append(done)
        return self.refuses

    def end(self, name: str, error: RequestError | None = None) -> None:
        for done in self.waiting.pop(name):
            done(error)


class Waiting:
    """The waits of one server."""

    def __init__(self, requests: int = 100, nbytes: int = 10_000) -> None:
        self.loads, self.admission = Loads(), Admission(requests, nbytes)
        self.waits = LoadWaits(self.loads, self.admission)
        self.ended: list[tuple[int, RequestError | None]] = []
        self.news = threading.Event()

    def hold(self, model: str, size: int = 10, left: float | None = None) -> tuple[HeldCall[int], RequestError | None]:
        held = HeldCall(next(IDS), bytes(size), (self.waits._clock(), left, False), None)
        error = UnknownModel("not loaded", reason=Reason.NOT_LOADED)
        error.model = (model, "")

        def ended(refused: RequestError | None) -> None:
            self.ended.append((held.call, refused))
            self.news.set()

        return held, self.waits.hold(held, error, ended)

    def taken(self) -> tuple[int, int, int]:
        return len(self.waits), self.admission.requests, self.admission.nbytes


def test_all_end_with_their_load_and_count_until_then() -> None:
    here = Waiting()
    held = [here.hold("a")[0] for _ in range(5)]
    other, _ = here.hold("b", 30)
    assert here.taken() == (6, 6, 80)
    here.loads.end("a")
    assert here.ended == [(h.call, None) for h in held] and here.taken() == (1, 1, 30)
    failed = ModelUnusable("cannot be opened")
    here.loads.end("b", failed)
    assert here.ended[-1] == (other.call, failed) and here.taken() == (0, 0, 0)


def test_a_call_ends_once_whatever_comes_first() -> None:
    here = Waiting()
    cancelled: list[int] = []
    first, second = here.hold("a")[0], here.hold("a")[0]
    first.cancelled = second.cancelled = lambda: cancelled.append(1)
    first.cancel()
    first.cancel()
    here.loads.end("a")
    second.cancel()
    assert cancelled == [1] and here.ended == [(second.call, None)] and here.taken() == (0, 0, 0)


def test_a_deadline_ends_a_wait_and_the_load_goes_on() -> None:
    here = Waiting()
    late, _ = here.hold("a", left=0.01)
    patient, _ = here.hold("a", left=3600.0)
    assert here.news.wait(60)
    ((call, error),) = here.ended
    assert call == late.call and error is not None and error.status.name == "DEADLINE_EXCEEDED"
    here.loads.end("a")
    assert here.ended[1:] == [(patient.call, None)] and here.taken() == (0, 0, 0)


def test_one_model_gets_half_of_what_others_leave_and_all_get_half_of_the_server() -> None:
    here = Waiting(requests=100)
    counts = []
    for model in "abc":
        count = 0
        while (refused := here.hold(model)[1]) is None:
            count += 1
        counts.append(count)
        assert refused.status.name == "RESOURCE_EXHAUSTED" and refused.reason is Reason.LOAD_WAITING
        assert f"model '{model}'" in str(refused)
    assert counts == [25, 12, 6] and sum(counts) <= 50 == here.admission.max_requests // 2
    assert here.taken() == (43, 43, 430)


def test_bytes_are_bounded_too_and_one_call_alone_always_may() -> None:
    here = Waiting(nbytes=10_000)
    assert here.hold("a", 9_000)[1] is None
    refused = here.hold("a", 1)[1]
    assert refused is not None and refused.reason is Reason.LOAD_WAITING
    refused = here.hold("b", 2_000)[1]
    assert refused is not None and refused.reason is Reason.SERVER_BYTES
    here.loads.end("a")
    assert here.taken() == (0, 0, 0)


def test_what_no_load_mends_is_refused_and_not_counted() -> None:
    here = Waiting()
    here.loads.refuses = ModelUnusable("failed a moment ago")
    _, refused = here.hold("a")
    assert refused is here.loads.refuses and here.taken() == (0, 0, 0) and not here.ended


def test_ended_calls_with_far_deadlines_are_not_kept() -> None:
    here = Waiting(requests=100_000)
    for _ in range(20):
        held: list[Any] = [here.hold("a", left=3600.0)[0] for _ in range(50)]
        here.loads.end("a")
        del held
    assert len(here.waits._due) < 150
