"""A batch queue, a server whose batches take exactly a + b·rows, and what must be true of the two after every step."""

from __future__ import annotations

from collections import Counter

from tests.unit.made import exact_run_time

from forwardpass.batching.batch_queue import BatchQueue
from forwardpass.batching.request import NEVER, QUEUED, RUNNING, SETTLED, Batch, QueueLimits, Request, Settled
from forwardpass.errors import DeadlineExceeded, Overloaded

LITTLE = 1e-9  # seconds: what sums of floats may be off by


class Machine:
    """A queue, a server whose batches take exactly a + b·rows, and what should be true of them after every step."""

    def __init__(self, limits: QueueLimits, a: float, b: float, instances: int = 1) -> None:
        self.limits = limits
        self.a, self.b = a, b
        self.queue = BatchQueue(limits, exact_run_time(a, b), instances)
        self.instances = instances
        self.now = 0.0
        self.requests: list[Request] = []
        self.batches: list[Batch] = []  # running, and when each will be done
        self.ends: list[float] = []
        self.told: Counter[int] = Counter()  # how often each request was settled, by its number
        self.ran: list[Request] = []  # in the order in which they were taken
        self.cancelled: set[int] = set()
        self.answered: set[int] = set()

    def takes(self, rows: int) -> float:
        return self.a + self.b * rows

    # -- steps ------------------------------------------------------------------------------------------------------

    def offer(self, *requests: Request) -> list[Settled]:
        before = self.queue.requests, self.queue.rows, self.queue.nbytes
        refused = self.queue.offer(requests, self.now)
        self.requests += requests
        for request, error in refused:
            self.settle(request)
            if isinstance(error, Overloaded):
                count, rows, nbytes = before  # at least; more were taken in since
                assert error.reason in ("queue_rows", "queue_requests", "queue_bytes")
                assert error.retry_after is not None and error.retry_after > 0
                beyond = (
                    count + len(requests) > self.limits.requests
                    or rows + sum(r.rows for r in requests) > self.limits.rows
                    or nbytes + sum(r.nbytes for r in requests) > self.limits.nbytes
                    or request.priority in self.limits.by_priority
                )
                assert beyond, f"{error}, and yet there was room"
            else:
                assert isinstance(error, DeadlineExceeded) and error.reason == "deadline_refused"
                free_at = min(self.ends, default=self.now) if len(self.ends) == self.instances else self.now
                assert request.deadline < free_at + self.takes(request.rows) + LITTLE, "it would have made it"
        self.check()
        return refused

    def cancel(self, request: Request) -> None:
        was = request.state
        settled = self.queue.cancel(request)
        assert settled == (was in (QUEUED, RUNNING))
        if settled:
            self.cancelled.add(request.call)
            self.settle(request)
        self.check()

    def take(self) -> Batch | None:
        order = sorted((r for r in self.requests if r.state == QUEUED), key=self.place)
        batch = self.queue.take(self.now)
        assert (batch is None) == (not order), "work must be taken exactly when there is some"
        if batch is None:
            return None
        assert batch.requests or batch.dropped, "nothing was taken and nothing dropped: this would go on for ever"
        dropped = self.timed_out(batch.dropped, self.queue.free_since)
        for request, error in dropped:
            self.settle(request)
            assert error.reason in ("deadline_expired", "deadline_hopeless")
            if error.reason == "deadline_expired":
                assert request.deadline <= self.now
            else:
                assert request.deadline < self.now + self.takes(request.rows) + LITTLE, "it would have made it"
        taken = batch.requests
        assert batch.rows == sum(r.rows for r in taken)
        assert batch.rows <= self.limits.max_batch_rows or len(taken) == 1
        assert len({r.stack_key for r in taken}) <= 1
        assert all(r.deadline > self.now and r.call not in self.cancelled for r in taken)
        waited = [r for r in (*taken, *self.requests) if r in taken or r.state == QUEUED]
        assert all(r.start_by >= self.queue.free_since for r in waited), "an instance became free too late for it"
        order = [r for r in order if r.start_by >= self.queue.free_since]
        if order:
            (stack_key,) = {r.stack_key for r in (*taken, *(s.request for s in dropped))}
            front = {r.stack_key for r in order if self.place(r)[:2] == self.place(order[0])[:2]}
            assert stack_key in front, "another stack key's requests were before these"
        if self.limits.deadlines and len(taken) > 1:
            done = self.now + self.takes(batch.rows)
            assert all(done <= r.deadline for r in taken), "neighbours made somebody late"
        if taken:
            self.check_order([r for r in order if r.stack_key == taken[0].stack_key], batch)
            self.ran += taken
            self.batches.append(batch)
            self.ends.append(self.now + self.takes(batch.rows))
            if self.instances == 1:
                self.queue.busy_until = self.now + self.queue.run_time.lower_bound(batch.rows)
        else:
            self.queue.finish(batch)
        self.check()
        return batch

    def expire(self) -> None:
        """As the watchdog does while every instance is busy."""
        if len(self.batches) == self.instances:
            assert not self.timed_out(self.queue.expire(self.now), self.now)
            assert all(r.start_by >= self.now for r in self.requests if r.state == QUEUED)
        self.check()

    def timed_out(self, dropped: list[Settled], free: float) -> list[Settled]:
        """Settle those whose queue timeout was over before an instance was free; the others."""
        for request, error in dropped:
            if error.reason == "queue_timeout":
                self.settle(request)
                assert request.start_by < free
        return [s for s in dropped if s.error.reason != "queue_timeout"]

    def finish(self) -> None:
        place = self.ends.index(min(self.ends))
        if len(self.batches) == self.instances:
            self.queue.free_since = max(self.now, self.ends[place])
        batch = self.batches.pop(place)
        self.now = max(self.now, self.ends.pop(place))
        owed = self.queue.finish(batch)
        assert owed == [r.call not in self.cancelled for r in batch.requests]
        for request, is_owed in zip(batch.requests, owed, strict=True):
            if is_owed:
                self.settle(request)
                self.answered.add(request.call)
        self.check()

    def drain(self) -> None:
        """Run until nothing is left, as a worker would."""
        while self.queue.requests or self.batches:
            while self.queue.requests and len(self.batches) < self.instances:
                self.take()
            if self.batches:
                self.finish()
        assert all(r.state == SETTLED for r in self.requests)
        assert self.told == Counter(r.call for r in self.requests), "settled more than once, or not at all"
        queue = self.queue
        assert (queue.rows, queue.requests, queue.nbytes) == (0, 0, 0)
        assert (queue.running_rows, queue.running_requests, len(queue)) == (0, 0, 0)
        assert queue.take(self.now) is None and queue.closes_at(self.now) == NEVER
        assert (queue._dated, queue._groups.dead) == (0, 0), "the short way is not taken again"

    def wait(self, seconds: float) -> None:
        """Time passes; what ends meanwhile is finished when it ends."""
        until = self.now + seconds
        while self.ends and min(self.ends) <= until:
            self.finish()
        self.now = max(self.now, until)

    # -- what must hold ----------------------------------------------------------------------------------------------

    def settle(self, request: Request) -> None:
        self.told[request.call] += 1
        assert request.state == SETTLED and self.told[request.call] == 1

    def check(self) -> None:
        waiting = [r for r in self.requests if r.state == QUEUED]
        queue, limits = self.queue, self.limits
        assert queue.requests == len(waiting)
        assert queue.rows == sum(r.rows for r in waiting)
        assert queue.nbytes == sum(r.nbytes for r in waiting)
        assert queue.requests <= limits.requests
        assert queue.requests <= 1 or (queue.rows <= limits.rows and queue.nbytes <= limits.nbytes)
        assert queue.running_requests == sum(len(b.requests) for b in self.batches)
        assert queue.running_rows == sum(b.rows for b in self.batches)
        if not limits.delay:
            assert not waiting or queue.closes_at(self.now) <= self.now, "an idle worker would leave this lying"

    def place(self, request: Request) -> tuple[float, ...]:
        """Where the rules put a request in the order of the queue."""
        if not self.limits.deadlines:
            return (request.priority, request.arrival, request.call)
        due = request.order[1]
        assert due <= min(request.deadline, request.start_by)
        return (request.priority, due, request.call)

    def check_order(self, order: list[Request], batch: Batch) -> None:
        """The batch is the front of its stack key's queue, unless that would make somebody late."""
        dropped = {s.request.call for s in batch.dropped}
        front = [r for r in order if r.call not in dropped]
        if self.limits.deadlines and not self.all_in_time(front):
            return
        assert [r.call for r in batch.requests] == [r.call for r in front[: len(batch.requests)]]

    def all_in_time(self, order: list[Request]) -> bool:
        """Whether running them all in this order, in full batches, makes every deadline, with room to spare."""
        at, rows, earliest = self.now, 0, NEVER
        for request in order:
            if rows and rows + request.rows > self.limits.max_batch_rows:
                at += self.takes(rows) * 1.2
                if at > earliest:
                    return False
                rows, earliest = 0, NEVER
            rows += request.rows
            earliest = min(earliest, request.deadline)
        return at + self.takes(rows) * 1.2 <= earliest
