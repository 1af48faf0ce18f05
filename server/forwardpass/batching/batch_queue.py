"""Chooses the requests of the next batch. Policy only: no threads, no I/O, no clock (`now` is passed in, in seconds).

A request goes NEW -> QUEUED -> RUNNING -> SETTLED, and may be settled from any earlier state:

    step      from      to        when
    offer     NEW       QUEUED    there is room, and its deadline can still be met
                        SETTLED   otherwise (returned with the error)
    take      QUEUED    RUNNING   it is in the batch
                        SETTLED   its deadline passed, or can no longer be met (returned with the batch, as dropped)
    expire    QUEUED    SETTLED   its queue timeout ended and no instance was free (returned)
    cancel    QUEUED    SETTLED   its client no longer waits: it never runs
              RUNNING   SETTLED   its client no longer waits: its rows are computed, its outputs discarded
    finish    RUNNING   SETTLED   its batch is done (returned, for its response)

The caller holds one lock around every call. A caller that gets a request back as settled must send its response.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter
from typing import Generic

from forwardpass.batching.batch_sizes import preferred_count, prefix
from forwardpass.batching.closing import closing
from forwardpass.batching.deadline_planner import all_in_time, best_batch, fill_batch, survey
from forwardpass.batching.large_requests import TURN, LargeRequests
from forwardpass.batching.ordering import patience
from forwardpass.batching.rejections import deadline_missed, queue_full, queue_timed_out
from forwardpass.batching.request import (
    NEVER,
    QUEUED,
    RUNNING,
    SETTLED,
    Batch,
    Closed,
    LargeTurn,
    QueueLimits,
    RequestT,
    Settled,
)  # fmt: skip
from forwardpass.batching.run_time_model import RunTimeModel
from forwardpass.batching.stack_groups import StackGroups
from forwardpass.errors import Reason

# How far ahead a batch is planned under deadlines, in full batches: enough to detect an overload, and cheap compared
# to the run.
LOOKAHEAD = 8

_order = attrgetter("order")


class BatchQueue(Generic[RequestT]):
    """Requests of one model version that wait for an instance.

    - Every offered request is settled exactly once: by offer, take, expire, cancel or finish.
    - A batch holds one stack key and at most `max_batch_rows` rows (a single larger request runs alone). It has a
      preferred size if the front of the queue makes one and no queued request has a deadline.
    - A request with more rows than a slice is in `large`, and runs in several batches: see `large_requests`.
    - Within a priority what is due first goes first (see `ordering`); equal ones in the order of arrival.
    - A batch never contains an expired or cancelled request.
    - A deadline covers the whole request; a queue timeout covers only its wait for an instance. So a timeout is
      compared with the time at which an instance became free: while one is idle, nothing times out.
    - rows, requests and nbytes are those of the QUEUED requests that are not large, and never exceed the limits; where
      none of them waits, any single one is accepted. `len` counts the large ones as well.
    - While all waiting requests can meet their deadlines, the order is kept. Otherwise the batch with the most rows
      per second goes first: in order, each batch would shrink to the few rows that its most urgent request leaves
      time for, and an overloaded server would answer no request in time.
    """

    def __init__(self, limits: QueueLimits, run_time: RunTimeModel, instances: int = 1, slice_rows: int = 0) -> None:
        """`slice_rows`: rows of a matrix of a request with more rows; 0: it must run whole."""
        self.limits = limits
        self.run_time = run_time
        self.instances = instances
        self.large = LargeRequests[RequestT](limits, run_time, instances, slice_rows)
        self.rows = self.requests = self.nbytes = 0
        self.running_requests = self.running_rows = 0
        self.busy_until = 0.0  # earliest expected end of the current run; of a single instance only
        self.free_since = -NEVER  # when an instance last became free after all were busy; set by the caller
        self._due = -NEVER  # when a request without a deadline that came last is due
        self._soonest = NEVER  # lower bound of the queued requests' start_by; may be too early
        self._closing = NEVER, Closed.IDLE  # with a queue delay: when the next batch closes, and why
        self._groups = StackGroups[RequestT]()
        self._dated = 0  # queued requests that have a deadline
        self._at = dict.fromkeys(limits.by_priority, 0)  # queued requests of each priority that has its own bound

    def __len__(self) -> int:
        return self.requests + self.large.requests

    @property
    def waiting_rows(self) -> int:
        """Rows that wait, of all requests."""
        return self.rows + self.large.rows

    @property
    def next_seconds(self) -> float:
        """Predicted seconds of the next batch, or of the longer one where it isn't known which of two it is."""
        seconds = self.run_time.predict(min(self.rows or 1, self.limits.max_batch_rows))
        return max(seconds, self.large.turn_seconds) if self.large.requests else seconds

    # -- in ---------------------------------------------------------------------------------------------------------

    def offer(self, requests: Iterable[RequestT], now: float) -> list[Settled[RequestT]]:
        """Queue `requests` and return the rejected ones. Never blocks.

        A request is rejected if it exceeds a bound (Overloaded, with a time to retry after), or if its deadline can't
        be met even if it ran next (DeadlineExceeded).
        """
        refused: list[Settled[RequestT]] = []
        limits = self.limits
        groups = self._groups
        large = self.large
        dated = limits.deadlines
        slice_rows = large.slice_rows
        base, row = patience(self.run_time, limits.max_batch_rows, len(groups), self.running_rows, self.instances)
        last = self._due if self.requests else -NEVER
        for request in requests:
            rows = request.rows
            if rows > slice_rows:
                if (settled := large.offer(request, now)) is not None:
                    refused.append(settled)
                elif request.start_by < self._soonest:
                    self._soonest = request.start_by
                continue
            if self.requests and (
                self.rows + rows > limits.rows
                or self.requests >= limits.requests
                or self.nbytes + request.nbytes > limits.nbytes
                or (self._at and self._at.get(request.priority, -1) >= limits.by_priority.get(request.priority, 0))
            ):
                request.state = SETTLED
                waiting = self.requests, self.rows, self.nbytes, self._at.get(request.priority, 0)
                refused.append(Settled(request, queue_full(request, limits, self.run_time, waiting)))
                continue
            if request.deadline != NEVER:
                start = self.busy_until if self.busy_until > now else now
                if dated and request.deadline < start + self.run_time.lower_bound(rows):
                    request.state = SETTLED
                    error = deadline_missed(request, now, Reason.DEADLINE_REFUSED, self.run_time.predict(rows))
                    refused.append(Settled(request, error))
                    continue
                self._dated += 1
            if request.start_by < self._soonest:
                self._soonest = request.start_by
            request.state = QUEUED
            self.rows += rows
            if dated:
                due = request.arrival + base + row * self.rows
                if due < last:
                    due = last  # the queue has become shorter, and who came before still goes before
                self._due = last = due
                if request.deadline < due:
                    due = request.deadline
                if request.start_by < due:
                    due = request.start_by
                request.order = (request.priority, due)
            self.requests += 1
            self.nbytes += request.nbytes
            if request.priority in self._at:
                self._at[request.priority] += 1
            group = groups.get(request.stack_key)
            if group is None:
                groups[request.stack_key] = [request]
            elif not group or group[-1].order <= request.order:
                group.append(request)
            else:
                insort(group, request, key=_order)
        return refused

    def cancel(self, request: RequestT) -> bool:
        """Cancel a request. Returns whether this settled it; False: it was settled before."""
        if request.state == QUEUED:
            self._leave(request)
            request.buffers = ()
            return True
        was_running = request.state == RUNNING
        if was_running:
            self.large.remove(request)
            request.state = SETTLED
        return was_running

    def expire(self, before: float) -> list[Settled[RequestT]]:
        """Settle and return requests whose queue timeout ended before `before`; all instances were busy until then."""
        expired = list[Settled[RequestT]]()
        if self._soonest >= before:
            return expired
        self._soonest = NEVER
        for request in chain(self._groups.waiting(), self.large):
            if request.state == QUEUED and request.start_by < self._soonest:
                if request.start_by < before:
                    expired.append(Settled(request, queue_timed_out(request, before)))
                else:
                    self._soonest = request.start_by
        for request, _ in expired:
            self._leave(request)
        return expired

    @property
    def has_timeouts(self) -> bool:
        """Whether a request with a queue timeout may be waiting."""
        return bool(len(self)) and self._soonest != NEVER

    def clear(self) -> list[RequestT]:
        """Settle and return all waiting requests: the model is being unloaded."""
        waiting = list(self._groups.waiting())
        for request in waiting:
            self._forget(request)
            request.state = SETTLED
        self._groups.clear()
        return waiting + self.large.clear()

    # -- out --------------------------------------------------------------------------------------------------------

    def closes_at(self, now: float) -> float:
        """When the next batch may be taken: at most `now` for immediately, inf when nothing waits."""
        if not len(self):
            return NEVER
        limits = self.limits
        if (
            not limits.delay
            or self.large.requests
            or self.rows >= limits.max_batch_rows
            or self._preferred(self._groups.first() or ())
        ):
            self._closing = now, Closed.FULL if self.rows >= limits.max_batch_rows else Closed.IDLE
            return now
        self._closing = closing(list(self._groups.waiting()), limits, self.run_time, self.rows)
        return self._closing[0]

    def take(self, now: float) -> Batch[RequestT] | None:
        """The next batch, or None when nothing waits. `dropped` holds expired and hopelessly late requests.

        The batch may be empty when a request was dropped.
        """
        expired = self.expire(self.free_since) if self._soonest < self.free_since else []
        group = self._groups.first()
        if self.large.requests:
            if group is None or self.large.goes_before(group[0], now):
                batch = self._take_turn(now, expired)
                if batch is not None:
                    return batch
            else:
                self.large.passed()
        if group is None:
            return self._start([], now, expired, Closed.IDLE) if expired else None
        if self._dated or self._groups.dead or expired or self.limits.preferred:
            return self._take_dated(group, now, expired)
        limit = self.limits.max_batch_rows
        if self.rows <= limit or len(group) == 1:
            chosen = group[:]
            group.clear()
            return self._start(chosen, now, [], self._closed(now))
        chosen = prefix(group, limit)
        del group[: len(chosen)]
        return self._start(chosen, now, [], Closed.FULL)

    def finish(self, batch: Batch[RequestT]) -> list[bool]:
        """Settle a finished batch. Returns for each request whether a response is owed (False: it was cancelled)."""
        self.running_requests -= len(batch.requests)
        self.running_rows -= batch.rows
        self.busy_until = 0.0
        owed = []
        for request in batch.requests:
            owed.append(request.state == RUNNING)
            request.state = SETTLED
        return owed

    def extend_turn(self, batch: Batch[RequestT], now: float, alone: bool) -> LargeTurn[RequestT] | None:
        """The next slice for a large request's turn; None: it ends. `alone`: it may last while nothing else waits."""
        (request,) = batch.requests
        others = not alone or self.requests or self.large.requests > 1
        if request.deadline <= now or (others and now - batch.taken >= TURN):
            return None
        turn = self.large.extend(request)
        if turn is not None:
            batch.rows += turn.rows
            self.running_rows += turn.rows
        return turn

    def finish_turn(self, batch: Batch[RequestT], failed: bool) -> tuple[bool, bool]:
        """As `finish`, of a turn of a large request: see LargeRequests.finish."""
        self.running_requests -= 1
        self.running_rows -= batch.rows
        self.busy_until = 0.0
        return self.large.finish(batch.requests[0], failed)

    # -- how --------------------------------------------------------------------------------------------------------

    def _take_turn(self, now: float, dropped: list[Settled[RequestT]]) -> Batch[RequestT] | None:
        """The next turn of a large request, as a batch. None: all of them were dropped, since they are too late."""
        turn = self.large.take(now, dropped)
        if turn is None:
            return None
        self.running_requests += 1
        self.running_rows += turn.rows
        return Batch([turn.request], turn.rows, 0, now, Closed.FULL, turn.request.deadline != NEVER, dropped, turn)

    def _take_dated(self, group: list[RequestT], now: float, dropped: list[Settled[RequestT]]) -> Batch[RequestT]:
        """As `take`, for deadlines, cancelled requests or preferred sizes."""
        limit, deadlines = self.limits.max_batch_rows, self.limits.deadlines
        live = list[RequestT]()
        seen = self._survey(group, 0, limit, live, dropped, now)
        chosen = live
        if live and not deadlines:
            chosen = prefix(live, limit)
        elif live:
            count, rows, room = fill_batch(live, limit, self.run_time, now)
            chosen = live[:count]
            # A full batch that is in time, or all there is, keeps the order. Otherwise look further ahead.
            safe = live[0].deadline >= now + self.run_time.upper_bound(rows)
            if not (safe and (room <= 0 or (count == len(live) and seen == len(group)))):
                seen = self._survey(group, seen, LOOKAHEAD * limit, live, dropped, now)
                if not all_in_time(live[count:], limit, self.run_time, now + self.run_time.predict(rows)):
                    chosen = best_batch(live, limit, self.run_time, now) or chosen
        closed = self._closed(now)
        if count := self._preferred(chosen):
            chosen, closed = chosen[:count], Closed.PREFERRED
        elif len(chosen) < len(live):
            fits = sum([r.rows for r in chosen]) + live[len(chosen)].rows <= limit
            closed = Closed.DEADLINE if fits and deadlines else Closed.FULL
        batch = self._start(chosen, now, dropped, closed)
        group[:seen] = [r for r in live if r.state == QUEUED]
        return batch

    def _preferred(self, group: Sequence[RequestT]) -> int:
        """How many requests from the front make the largest feasible preferred size; 0: none is feasible."""
        if self._dated or not self.limits.preferred:
            return 0
        return preferred_count(group, self.limits.preferred, self.limits.max_batch_rows)

    def _survey(
        self,
        group: list[RequestT],
        seen: int,
        limit: int,
        live: list[RequestT],
        dropped: list[Settled[RequestT]],
        now: float,
    ) -> int:
        """Sort group[seen:] into `live` and `dropped` until `live` has `limit` rows. Returns how many were seen."""
        late: list[tuple[RequestT, Reason]] = []
        trust = 1.0 - self.run_time.margin if self.limits.deadlines else 0.0
        more, dead = survey(group[seen:] if seen else group, limit, self.run_time, trust, now, live=live, late=late)
        self._groups.dead -= dead
        for request, why in late:
            self._forget(request)
            request.state = SETTLED
            dropped.append(Settled(request, deadline_missed(request, now, why, self.run_time.predict(request.rows))))
        return seen + more

    def _closed(self, now: float) -> int:
        """Why a batch closes now that is neither full nor cut."""
        if not self.limits.delay:
            return Closed.IDLE
        close, why = self._closing
        return why if close <= now else Closed.ENDING

    def _start(
        self, chosen: list[RequestT], now: float, dropped: list[Settled[RequestT]], closed: int
    ) -> Batch[RequestT]:
        rows = nbytes = 0
        for request in chosen:
            request.state = RUNNING
            rows += request.rows
            nbytes += request.nbytes
        dated = self._dated > 0
        if dated:
            self._dated -= sum(1 for r in chosen if r.deadline != NEVER)
        for request in chosen if self._at else ():
            if request.priority in self._at:
                self._at[request.priority] -= 1
        self.rows -= rows
        self.requests -= len(chosen)
        self.nbytes -= nbytes
        self.running_requests += len(chosen)
        self.running_rows += rows
        if rows >= self.limits.max_batch_rows and closed != Closed.PREFERRED:
            closed = Closed.FULL
        return Batch(chosen, rows, nbytes, now, closed, dated, dropped)

    def _forget(self, request: RequestT) -> None:
        """Stop counting a queued request that leaves without running."""
        self.rows -= request.rows
        self.requests -= 1
        self.nbytes -= request.nbytes
        if request.deadline != NEVER:
            self._dated -= 1
        if request.priority in self._at:
            self._at[request.priority] -= 1

    def _leave(self, request: RequestT) -> None:
        """Settle a queued request; of a group it is removed later."""
        request.state = SETTLED
        if self.large.remove(request):
            return
        self._forget(request)
        self._groups.left(self.requests)
