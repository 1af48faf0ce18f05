"""Requests with more rows than a slice: which of them runs next, and for how long. Pure: no threads, no clock.

Such a request does not wait as a whole. When it is its turn, slices of it run for TURN seconds, or for as long as
nothing else waits; its other rows wait for its next turn. Turns go round by client, and among the requests of one
client, so that shares are fair by client and by row; beside smaller requests they are limited by SHARE. A request goes

    QUEUED -> RUNNING    with its first turn
    RUNNING -> SETTLED   when its last turn is finished, or one has failed, or it is cancelled, or too late

and no slice of it starts once it is settled. Its deadline and its queue timeout are its own, not its turns'.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Generic

from forwardpass.batching.rejections import deadline_missed, queue_full
from forwardpass.batching.request import (
    NEVER,
    QUEUED,
    RUNNING,
    SETTLED,
    LargeTurn,
    QueueLimits,
    Request,
    RequestT,
    Settled,
)
from forwardpass.batching.run_time_model import RunTimeModel
from forwardpass.errors import Reason, RequestError

# Seconds after which no slice is added to a turn while others wait. One slice of a small network is not worth what a
# turn costs besides.
TURN = 2e-3

# Batches that go before a turn, at most, while both wait: one client's large requests get a fifth of the batches, and
# those of several up to a half.
SHARE = 4

WHERE = "the model's queue of requests larger than a batch"
Lane = tuple[int, Hashable]  # of a priority, and a client


class LargeRequests(Generic[RequestT]):
    """The large requests of one queue.

    - rows, requests and nbytes are of what waits: rows that have not had a turn, and the requests that have such. They
      are bounded apart from other requests', by `limits`, so that neither kind takes the other's room. Where no other
      waits, any single one is accepted.
    - Slices begin at multiples of `slice_rows`, so that answers are the same bits however turns fall. Those of one
      request may run at the same time on several instances.
    """

    def __init__(self, limits: QueueLimits, run_time: RunTimeModel, instances: int, slice_rows: int) -> None:
        """`slice_rows`: rows of a matrix; 0: rows are not independent, so that no request may be sliced."""
        self.limits = dataclasses.replace(limits, rows=limits.large_rows)
        self.run_time = run_time
        self.instances = instances
        self.slice_rows = slice_rows or NEVER
        self.rows = self.requests = self.nbytes = 0
        self._lanes: dict[Lane, deque[RequestT]] = {}  # in the order of their next turns within a priority
        self._turns: dict[RequestT, LargeTurn[RequestT]] = {}  # the last turn of each request that waits or runs
        self._at = dict.fromkeys(limits.by_priority, 0)  # requests that wait, of each priority with a bound of its own
        self._passed = 0  # batches that went before the turn that comes next

    # -- in ---------------------------------------------------------------------------------------------------------

    def offer(self, request: RequestT, now: float) -> Settled[RequestT] | None:
        """Let it wait for its turns. Or settle it: it exceeds a bound, or would be late even if it ran next."""
        limits, waiting = self.limits, (self.requests, self.rows, self.nbytes, self._at.get(request.priority, 0))
        error: RequestError | None = None
        if self.requests and (
            self.rows + request.rows > limits.rows
            or self.requests >= limits.requests
            or self.nbytes + request.nbytes > limits.nbytes
            or (request.priority in self._at and waiting[3] >= limits.by_priority[request.priority])
        ):
            error = queue_full(request, limits, self.run_time, waiting, WHERE)
        elif limits.deadlines and request.deadline < now + self.seconds(request.rows):
            error = deadline_missed(request, now, Reason.DEADLINE_REFUSED, self.seconds(request.rows))
        if error is not None:
            request.state = SETTLED
            return Settled(request, error)
        request.state = QUEUED
        self.rows += request.rows
        self._count(request, 1)
        client = request.client  # asked for once: it may not be known any more when the client has left
        self._turns[request] = LargeTurn(request, client, 0, 0)
        self._lanes.setdefault((request.priority, client), deque()).append(request)
        return None

    def seconds(self, rows: int) -> float:
        """The least that the last `rows` rows of a request may take: in slices, on all instances, with nothing else."""
        slices = -(-rows // self.slice_rows)
        return self.run_time.lower_bound(int(min(rows, self.slice_rows))) * max(1.0, slices / self.instances)

    # -- out --------------------------------------------------------------------------------------------------------

    def goes_before(self, request: Request, now: float) -> bool:
        """Whether the next turn goes before `request`, the first of the others. Some large request must wait."""
        priority, _ = self._next_lane()
        if priority != request.priority:
            return priority < request.priority
        clients = sum(1 for lane in self._lanes if lane[0] == priority)
        allowed = max(1, SHARE // clients)
        if self._passed < allowed:
            return False
        # A deadline that cannot wait for a turn does not have to, yet no stream of them keeps turns away.
        return self._passed >= 2 * allowed or request.deadline >= now + self.turn_seconds + self.run_time.predict(1)

    def passed(self) -> None:
        """Record that a batch of other requests was taken."""
        self._passed += 1

    def take(self, now: float, dropped: list[Settled[RequestT]]) -> LargeTurn[RequestT] | None:
        """The next turn. Requests that can't meet their deadlines any more are added to `dropped`; None: all were."""
        while self._lanes:
            lane = self._next_lane()
            request = self._lanes[lane][0]
            last = self._turns[request]
            seconds = self.seconds(request.rows - last.stop) if self.limits.deadlines else 0.0
            if now < request.deadline >= now + seconds:
                return self._start(lane, last)
            why = Reason.DEADLINE_EXPIRED if request.deadline <= now else Reason.DEADLINE_HOPELESS
            self.remove(request)
            request.state = SETTLED
            dropped.append(Settled(request, deadline_missed(request, now, why, seconds)))
        return None

    def _start(self, lane: Lane, last: LargeTurn[RequestT]) -> LargeTurn[RequestT]:
        request, waiting = last.request, self._lanes.pop(lane)
        waiting.rotate(-1)
        self._lanes[lane] = waiting  # behind the other clients'
        request.state = RUNNING
        self._passed = 0
        return self._next_slice(last._replace(running=last.running + 1))

    def extend(self, request: RequestT) -> LargeTurn[RequestT] | None:
        """The next slice of `request` in a turn that it has; None: none is left."""
        last = self._turns[request]
        return self._next_slice(last) if last.stop < request.rows else None

    def _next_slice(self, last: LargeTurn[RequestT]) -> LargeTurn[RequestT]:
        request = last.request
        stop = min(request.rows, last.stop + int(self.slice_rows))
        found = self._turns[request] = last._replace(start=last.stop, stop=stop)
        self.rows -= found.rows
        if stop == request.rows:
            self._leave(found)
        return found

    def finish(self, request: RequestT, failed: bool) -> tuple[bool, bool]:
        """Record that a turn ended. Returns whether the request's response is owed now, and whether it was the last.

        `failed`: the response is an error, and there are no further turns. Last is the turn after which none runs or
        will, which is after the response where others were still running when one failed.
        """
        if failed:
            self.remove(request)
        turn = self._turns[request]
        turn = self._turns[request] = turn._replace(running=turn.running - 1)
        last = not turn.running and turn.stop >= request.rows
        if last:
            del self._turns[request]
        owed = request.state == RUNNING and (failed or last)
        if owed:
            request.state = SETTLED
        return owed, last

    def remove(self, request: RequestT) -> bool:
        """Give it no further turns. Returns whether rows of it were waiting. The caller settles it."""
        last = self._turns.get(request)
        if last is None or last.stop >= request.rows:
            return False
        if last.running:
            self._turns[request] = last._replace(stop=request.rows)
        else:
            del self._turns[request]
        self.rows -= request.rows - last.stop
        self._leave(last)
        return True

    def clear(self) -> list[RequestT]:
        """Settle and return all that wait for a turn, the first or another."""
        waiting = list(self)
        for request in waiting:
            self.remove(request)
            request.state = SETTLED
        return waiting

    def __iter__(self) -> Iterator[RequestT]:
        """Those that wait for a turn, the first or another."""
        for lane in self._lanes.values():
            yield from lane

    @property
    def turn_seconds(self) -> float:
        """Predicted seconds of a turn."""
        rows = self.slice_rows
        return max(TURN, self.run_time.predict(int(rows))) if self.requests and rows != NEVER else 0.0

    # -- how --------------------------------------------------------------------------------------------------------

    def _next_lane(self) -> Lane:
        return min(self._lanes, key=_priority)  # the first of the lowest number

    def _leave(self, last: LargeTurn[RequestT]) -> None:
        """No row of its request waits any more."""
        lane = last.request.priority, last.client
        self._lanes[lane].remove(last.request)
        if not self._lanes[lane]:
            del self._lanes[lane]
        self._count(last.request, -1)

    def _count(self, request: RequestT, change: int) -> None:
        self.requests += change
        self.nbytes += change * request.nbytes
        if request.priority in self._at:
            self._at[request.priority] += change


def _priority(lane: Lane) -> int:
    return lane[0]
