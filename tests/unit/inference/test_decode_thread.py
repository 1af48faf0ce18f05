"""Large messages beside the thread that reads: turns, and what a failure or a call that is gone leaves behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.service import models
from tests.unit.inference.test_intake import Sink
from tests.unit.made import message

from forwardpass.errors import InvalidRequest, RequestError
from forwardpass.inference.decode_thread import DecodeThread
from forwardpass.inference.intake import ELSEWHERE
from forwardpass.transport.memory_budget import MemoryBudget, Share

SECONDS = 30.0


def test_groups_take_turns() -> None:
    thread, done, begin, over = DecodeThread(), list[str](), threading.Event(), threading.Event()
    thread.submit("first", lambda: begin.wait(SECONDS) and None)
    for group, name in [("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("b", "b2"), ("c", "c1")]:
        thread.submit(group, lambda name=name: done.append(name))  # type: ignore[misc]
    thread.submit("a", over.set)
    begin.set()
    assert over.wait(SECONDS)
    assert done == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_the_thread_survives_what_fails(caplog: pytest.LogCaptureFixture) -> None:
    thread, over = DecodeThread(), threading.Event()

    def fail() -> None:
        raise RuntimeError("by design")

    thread.submit(1, fail)
    thread.submit(1, over.set)
    assert over.wait(SECONDS) and "by design" in caplog.text


class Call:
    """A call with room for `limit` bytes."""

    def __init__(self, limit: int = 1 << 20) -> None:
        self.share = Share(MemoryBudget(limit))
        self.reserved = 0

    def reserve(self, nbytes: int) -> bool:
        self.reserved = nbytes
        return True


class Packed:
    """A compressed message as a transport has it."""

    def __init__(self, inflate: Callable[[], bytes]) -> None:
        self.inflate = inflate

    def __len__(self) -> int:
        return ELSEWHERE


class Deferring(Sink):
    """A sink whose intake hands large messages over; `resumed` has those that are decoded."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        models.save(root, "wide", models.chain((1 << 14, 4)))
        (entry,) = [e for e in self.repository.discover() if e.name == "wide"]
        self.repository.load(entry)
        self.intake = type(self.intake)(self, self.repository, self.admission, self.metrics, 1 << 20)
        self.resumed: list[tuple[int, Callable[[], Any]]] = []
        self.came = threading.Semaphore(0)
        self.intake.resume = self._resume

    def _resume(self, call: int, take: Callable[[], Any]) -> None:
        self.resumed.append((call, take))
        self.came.release()

    def offer(self, call: int, sent: Any, room: Call) -> Any:
        self.intake.begin()
        return self.intake.take(call, sent, None, False, room)

    def decoded(self) -> Callable[[], Any]:
        assert self.came.acquire(timeout=SECONDS)
        return self.resumed.pop(0)[1]


X = np.random.default_rng(0).standard_normal((3, 1 << 14)).astype(np.float32)
LARGE = message([("x", X)], model_name="wide").SerializeToString()


@pytest.fixture
def sink(tmp_path: Path) -> Any:
    made = Deferring(tmp_path)
    yield made
    assert made.repository.close(5.0)
    assert (made.admission.requests, made.admission.nbytes) == (0, 0)


def test_a_large_message_is_decoded_elsewhere_once_and_known_from_then_on(sink: Deferring) -> None:
    assert len(LARGE) > ELSEWHERE
    room = Call()
    assert sink.offer(1, LARGE, room) is None and sink.intake.decoding == 1
    take = sink.decoded()
    sink.intake.begin()
    assert take() is not None
    sink.run()
    assert sink.reason(1) == "answered" and room.share.nbytes == 0
    assert sink.offer(2, LARGE, room) is not None  # by its template, at once
    sink.run()
    assert sink.answers[1] == sink.answers[2]


@pytest.mark.parametrize("failure", [InvalidRequest("broken"), RuntimeError("by design")], ids=["refused", "failed"])
def test_what_cannot_be_decoded_is_answered(sink: Deferring, failure: Exception) -> None:
    def inflate() -> bytes:
        raise failure

    room = Call()
    assert sink.offer(1, Packed(inflate), room) is None
    assert sink.decoded()() is None
    (answer,) = sink.answers[1]
    assert isinstance(answer, RequestError) and room.share.nbytes == 0
    assert str(answer) == ("broken" if isinstance(failure, RequestError) else str(answer))


def test_what_waits_for_its_turn_is_bounded(sink: Deferring) -> None:
    held, over = Call(4 * len(LARGE)), threading.Event()

    def inflate() -> bytes:
        assert over.wait(SECONDS)
        return LARGE

    assert sink.offer(0, Packed(inflate), held) is None  # which keeps the thread busy
    for call in range(1, 6):
        sink.offer(call, LARGE, held)
    assert [call for call in range(1, 6) if call in sink.answers] == [2, 3, 4, 5]
    assert {sink.reason(call) for call in (2, 3, 4, 5)} == {"server_bytes"}
    over.set()
    for _ in range(2):
        take = sink.decoded()
        sink.intake.begin()
        take()
        sink.run()
    assert sink.reason(1) == "answered" and held.share.nbytes == 0


def test_a_call_that_is_gone_leaves_nothing(sink: Deferring) -> None:
    room = Call()
    assert sink.offer(1, LARGE, room) is None
    sink.decoded()  # and its transport does not take it
    sink.run()
    assert not sink.answers and room.share.nbytes == 0
