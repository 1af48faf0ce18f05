"""Requests of several turns among others on one queue, with a clock of the test's own: each is settled once, no row
runs twice or after its end, neither kind starves the other, and clients share."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.made import Numbered, exact_run_time, queued

from forwardpass.batching.batch_queue import BatchQueue
from forwardpass.batching.large_requests import SHARE, TURN
from forwardpass.batching.request import NEVER, QUEUED, RUNNING, SETTLED, Batch, LargeTurn, QueueLimits
from forwardpass.errors import DeadlineExceeded, Overloaded

A, B, SLICE = 2e-3, 1e-4, 8  # seconds a matrix, seconds a row, rows a matrix: a slice takes longer than TURN


class Owned(Numbered):
    """A request of a client."""

    client: str = ""  # type: ignore[assignment]


def large(rows: int, client: str = "c", **more: float) -> Owned:
    made = queued(rows, **more)  # type: ignore[arg-type]
    made.__class__ = Owned
    assert isinstance(made, Owned)
    made.client = client
    return made


class Server:
    """A queue, and instances that run what it gives them. Checks what must hold after every step."""

    def __init__(self, instances: int = 1, a: float = A, b: float = B, slice_rows: int = SLICE, **limits: int) -> None:
        self.limits = QueueLimits(**{"max_batch_rows": SLICE, **limits})  # type: ignore[arg-type]
        self.queue = BatchQueue[Numbered](self.limits, exact_run_time(a, b), instances, slice_rows)
        self.a, self.b = a, b
        self.instances = instances
        self.now = 0.0
        self.running: list[tuple[float, Batch[Numbered]]] = []
        self.batches: list[Batch[Numbered]] = []  # in the order in which they were taken
        self.offered: list[Numbered] = []
        self.settled: Counter[int] = Counter()
        self.answered: set[int] = set()
        self.rows_run: dict[int, list[tuple[int, int]]] = {}

    def offer(self, *requests: Numbered) -> list[str]:
        """Reasons of those that were refused."""
        self.offered += requests
        refused = self.queue.offer(requests, self.now)
        for request, _ in refused:
            self._settle(request)
        self.check()
        return [error.reason for _, error in refused]

    def cancel(self, request: Numbered) -> None:
        was = request.state
        assert self.queue.cancel(request) == (was in (QUEUED, RUNNING))
        if was in (QUEUED, RUNNING):
            self._settle(request)
        self.check()

    def take(self) -> Batch[Numbered] | None:
        batch = self.queue.take(self.now)
        if batch is None:
            assert not len(self.queue)
            return None
        for request, error in batch.dropped:
            assert isinstance(error, DeadlineExceeded)
            self._settle(request)
        assert all(request.state == RUNNING for request in batch.requests), "a turn of a request that was settled"
        if batch.requests:
            self.batches.append(batch)
            self.running.append((self.now + self.seconds(batch), batch))
        else:
            self.queue.finish(batch)
        if batch.turn is not None:
            self._ran(batch.turn)
        self.check()
        return batch

    def extend(self, batch: Batch[Numbered], alone: bool = True) -> bool:
        """Let one more slice run in a turn. Returns whether there was one."""
        turn = self.queue.extend_turn(batch, max(self.now, batch.taken + self.seconds(batch)), alone)
        if turn is not None:
            assert turn.request.state == RUNNING and turn.request is batch.requests[0]
            self._ran(turn)
        self.running = [(b.taken + self.seconds(b), b) if b is batch else (end, b) for end, b in self.running]
        self.check()
        return turn is not None

    def _ran(self, turn: LargeTurn[Numbered]) -> None:
        spans = self.rows_run.setdefault(turn.request.call, [])
        assert turn.start == (spans[-1][1] if spans else 0), "rows ran twice, or were left out"
        assert turn.start % SLICE == 0 and (turn.rows == SLICE or turn.stop == turn.request.rows)
        spans.append((turn.start, turn.stop))

    def seconds(self, batch: Batch[Numbered]) -> float:
        return -(-batch.rows // SLICE) * self.a + self.b * batch.rows

    def finish(self, failed: bool = False) -> None:
        end, batch = min(self.running, key=lambda one: one[0])
        self.running.remove((end, batch))
        self.now = max(self.now, end)
        self.queue.free_since = self.now
        if batch.turn is None:
            owed = list(zip(batch.requests, self.queue.finish(batch), strict=True))
        else:
            is_owed, last = self.queue.finish_turn(batch, failed)
            others = [b for _, b in self.running if b.requests[:1] == batch.requests]
            waits = batch.requests[0] in list(self.queue.large)
            assert last == (not others and not waits)
            owed = [(batch.requests[0], is_owed)]
        for request, is_owed in owed:
            if is_owed:
                self._settle(request)
                self.answered.add(request.call)
                if batch.turn is not None and not failed:
                    assert self.rows_run[request.call][-1][1] == request.rows, "it was answered before its last row"
        self.check()

    def run(self) -> None:
        """Until nothing is left."""
        while len(self.queue) or self.running:
            while len(self.queue) and len(self.running) < self.instances:
                self.take()
            if self.running:
                self.finish()
        assert Counter(r.call for r in self.offered) == self.settled
        assert all(r.state == SETTLED for r in self.offered)
        queue = self.queue
        assert (queue.rows, queue.requests, queue.nbytes, queue.running_rows, queue.running_requests) == (0,) * 5
        assert (queue.large.rows, queue.large.requests, queue.large.nbytes) == (0, 0, 0)
        assert not queue.large._lanes and not queue.large._turns

    def _settle(self, request: Numbered) -> None:
        self.settled[request.call] += 1
        assert request.state == SETTLED and self.settled[request.call] == 1

    def check(self) -> None:
        """The bounds, of each kind by itself; what is left to run is what counts."""
        found, limits = self.queue.large, self.limits
        waiting = list(found)
        left = [r.rows - (self.rows_run[r.call][-1][1] if r.call in self.rows_run else 0) for r in waiting]
        assert (found.rows, found.requests, found.nbytes) == (sum(left), len(left), sum(r.nbytes for r in waiting))
        assert found.requests <= 1 or (found.rows <= limits.large_rows and found.nbytes <= limits.nbytes)
        assert found.requests <= limits.requests
        assert self.queue.requests <= 1 or self.queue.rows <= limits.rows


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[str, int, float]]:
    steps = "small", "small", "large", "large", "cancel", "take", "take", "extend", "finish", "fail", "clear"
    kind = st.sampled_from(steps)
    return draw(st.lists(st.tuples(kind, st.integers(0, 40), st.sampled_from((NEVER, NEVER, 0.1, 0.01))), max_size=60))


@settings(max_examples=400, deadline=None)
@given(steps(), st.integers(1, 3), st.sampled_from((60, 10_000)))
def test_each_is_settled_once_and_no_row_runs_twice(
    schedule: list[tuple[str, int, float]], instances: int, bound: int
) -> None:
    s = Server(instances, rows=20, large_rows=bound, requests=10)
    for step, number, seconds in schedule:
        match step:
            case "small":
                s.offer(queued(1 + number % SLICE, s.now, s.now + seconds, 1 + number % 2))
            case "large":
                s.offer(large(SLICE + 1 + number, "abc"[number % 3], deadline=s.now + seconds, priority=1 + number % 2))
            case "cancel" if s.offered:
                s.cancel(s.offered[-1 - number % len(s.offered)])
            case "take" if len(s.running) < instances:
                s.take()
            case "extend" if s.running and s.running[-1][1].turn is not None:
                s.extend(s.running[-1][1], alone=bool(number % 2))
            case "finish" | "fail" if s.running:
                s.finish(step == "fail")
            case "clear" if number == 7:
                for request in s.queue.clear():
                    s._settle(request)
    s.run()


def test_a_small_one_waits_for_one_turn_whatever_waits_besides() -> None:
    s = Server()
    s.offer(*(large(500, client) for client in "abcdef"))
    for _ in range(20):
        s.take()
        small = queued(arrival=s.now)
        s.offer(small)
        s.finish()  # the turn that ran when it came
        batch = s.take()
        assert batch is not None and batch.requests == [small]
        s.finish()
    s.run()


@pytest.mark.parametrize("clients", [1, 2, 4, 9])
def test_large_and_small_share_when_both_have_more_than_fits(clients: int) -> None:
    s = Server(rows=10_000)
    s.offer(*(large(800, str(client)) for client in range(clients)))
    for _ in range(200):
        s.offer(*(queued(arrival=s.now) for _ in range(2 * SLICE - s.queue.rows)))
        s.take()
        s.finish()
    turns = [batch.turn is not None for batch in s.batches]
    allowed = max(1, SHARE // clients)
    between = "".join("x" if turn else "." for turn in turns).split("x")[1:-1]
    assert set(map(len, between)) == {allowed}
    for request in s.offered[clients:]:
        s.queue.cancel(request)


def test_clients_share_by_rows_however_many_requests_they_have() -> None:
    s = Server()
    s.offer(*(large(80, "many") for _ in range(50)), large(80, "one"), large(80, "another"))
    for _ in range(30):
        s.take()
        s.finish()
    counts = Counter(batch.requests[0].client for batch in s.batches)
    assert counts == {"many": 10, "one": 10, "another": 10}
    assert len({b.requests[0].call for b in s.batches[::3]}) == 10, "requests of one client take turns as well"


def test_turns_use_every_idle_instance() -> None:
    s = Server(instances=3)
    s.offer(large(3 * SLICE))
    batches = [s.take() for _ in range(3)]
    assert [b and b.turn and (b.turn.start, b.turn.stop) for b in batches] == [(0, 8), (8, 16), (16, 24)]
    s.run()


@pytest.mark.parametrize(("others", "alone", "slices"), [(True, True, 23), (False, True, 40), (False, False, 23)])
def test_a_turn_lasts_for_its_time_or_while_nothing_else_waits(others: bool, alone: bool, slices: int) -> None:
    s = Server(a=1e-5, b=1e-5)  # 90 us a slice, so that the 23rd ends after TURN
    s.offer(large(SLICE * 40))
    batch = s.take()
    if others:
        s.offer(queued())
    assert batch is not None
    while s.extend(batch, alone=alone):
        pass
    assert batch.rows == slices * SLICE
    assert slices == 40 or TURN <= s.seconds(batch) < TURN + 90e-6
    s.run()


def test_a_turn_is_not_extended_beyond_a_cancellation_or_a_deadline() -> None:
    s = Server()
    gone, late = large(SLICE * 40), large(SLICE * 40, deadline=1.0)
    s.offer(gone)
    batch = s.take()
    assert batch is not None and s.extend(batch)
    s.cancel(gone)
    assert not s.extend(batch)
    s.finish()
    s.offer(late)
    batch = s.take()
    assert batch is not None and s.extend(batch)
    s.now = 1.0
    assert not s.extend(batch)
    s.run()
    assert not s.answered


def test_rows_that_depend_on_each_other_are_never_divided() -> None:
    s = Server(slice_rows=0)
    s.offer(queued(1000))
    batch = s.take()
    assert batch is not None and batch.turn is None and batch.rows == 1000
    s.run()


def test_neither_kind_takes_the_others_room() -> None:
    s = Server(rows=20, large_rows=1000, requests=4)
    assert s.offer(large(5000)) == []  # any single one
    assert s.offer(large(9)) == ["queue_rows"]
    assert s.offer(*(queued(7) for _ in range(3))) == ["queue_rows"]
    while s.queue.large.rows + 9 > 1000:
        s.take()
        s.finish()
    assert s.offer(large(9)) == []  # what is left to run counts
    s.run()
    assert s.offer(*(large(9) for _ in range(5))) == ["queue_requests"]
    assert s.offer(queued()) == []
    s.run()


def test_the_bound_says_whose_it_is() -> None:
    s = Server(large_rows=100)
    ((request, error),) = s.queue.offer([large(90), large(20)], 0.0)
    assert isinstance(error, Overloaded) and request.rows == 20
    assert "queue of requests larger than a batch is full: 90 rows wait, the bound is 100, and 20 would" in str(error)


def test_a_deadline_covers_all_turns() -> None:
    s = Server()
    whole = 10 * (A + B * SLICE)
    assert s.offer(large(10 * SLICE, deadline=0.5 * whole)) == ["deadline_refused"]
    tight, other = large(10 * SLICE, "a", deadline=1.2 * whole), large(100 * SLICE, "b")
    assert s.offer(tight, other) == []
    while tight.state != SETTLED:  # they take turns, so that it can't be in time
        s.take()
        if s.running:
            s.finish()
    assert s.settled[tight.call] == 1 and tight.call not in s.answered
    assert len(s.rows_run[tight.call]) < 10, "its turns ended once it was hopeless"
    s.run()
    assert s.answered == {other.call}


def test_a_deadline_that_cannot_wait_for_a_turn_goes_first_and_keeps_none_away() -> None:
    s = Server()
    bulk = large(50 * SLICE)
    s.offer(bulk)
    for _ in range(60):
        s.offer(*(queued(SLICE, s.now, s.now + 2.5 * (A + B * SLICE)) for _ in range(2 - s.queue.requests)))
        s.take()
        if s.running:
            s.finish()
    assert sum(batch.turn is not None for batch in s.batches) >= len(s.batches) // (2 * SHARE + 2)
    s.run()


def test_a_queue_timeout_ends_with_the_first_turn() -> None:
    s = Server()
    s.offer(queued())
    s.take()
    first, second = large(100, start_by=0.5), large(100, start_by=2.0)
    s.offer(first, second)
    ((request, error),) = s.queue.expire(1.0)
    assert request is first and error.reason == "queue_timeout"
    s._settle(first)
    s.finish()
    s.take()
    assert not s.queue.expire(9.0)
    s.run()
    assert second.call in s.answered


def test_priorities_come_before_shares() -> None:
    rng = random.Random(0)
    s = Server(instances=2)
    s.offer(*(large(rng.randint(9, 90), rng.choice("ab"), priority=rng.randint(1, 3)) for _ in range(20)))
    s.offer(*(queued(priority=rng.randint(1, 3)) for _ in range(50)))
    s.run()
    taken = [batch.requests[0].priority for batch in s.batches]
    assert taken == sorted(taken)
