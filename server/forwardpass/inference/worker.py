"""Runs one model version: takes batches from its queue, stacks, runs, scatters, and settles every request exactly once.

A model has `instances` slots, with one run at a time each. A slot is used by one of the model's own threads or, when
the predicted run is too short to be worth a hand-over, by the thread that received the request (`run_pending`). A
thread that holds a slot returns to the queue after its run, so a non-empty queue is always served. On devices every
instance is a session with its own thread, and all of them take from the one queue. The threads: `worker_threads`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from forwardpass.batching.admission import Admission
from forwardpass.batching.batch_queue import BatchQueue
from forwardpass.batching.rejections import being_replaced, reject_late
from forwardpass.batching.request import RUNNING, SETTLED, Batch, LargeTurn, Settled, WorkerOptions
from forwardpass.batching.run_time_model import RunTimeModel
from forwardpass.errors import Reason
from forwardpass.execution.session import Session
from forwardpass.inference.accounting import log_requests, record_batch, record_single, record_turn, waits_of
from forwardpass.inference.batch_runner import BatchRunner
from forwardpass.inference.large_run import LargeRun
from forwardpass.inference.request import AnyRequest, deliver
from forwardpass.inference.request_traces import trace_batch, trace_refused
from forwardpass.inference.runs import Runs
from forwardpass.inference.settling import Rejections, count_errors
from forwardpass.inference.worker_threads import IDLE_SECONDS, WorkerThreads
from forwardpass.model.signature import ModelSignature
from forwardpass.observability.flight_record import RECEIVER
from forwardpass.observability.log_limit import LogLimit
from forwardpass.observability.model_metrics import BatchRecord, ModelMetrics
from forwardpass.protocol.timings import BatchTiming
from forwardpass.transport.interface import Answer

logger = logging.getLogger(__name__)
logger.addFilter(LogLimit())


class Worker:
    """Serves one model version. Thread-safe.

    - A request passed to `submit` is answered exactly once, unless it is cancelled.
    - A failed batch is run again in halves until the failing request is alone; the others get their responses.
    - `close` rejects requests that are still waiting, and waits for the threads to end.
    """

    def __init__(
        self,
        name: str,
        version: str,
        sessions: Sequence[Session],
        signature: ModelSignature,
        *,
        options: WorkerOptions,
        run_time: RunTimeModel,
        metrics: ModelMetrics,
        admission: Admission,
        clock: Callable[[], float] = time.monotonic,
        lost: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`sessions`: one shared by all instances, or one for each.

        `lost` is called, from any thread, with the reason when a device has failed permanently; it must not block.
        """
        self.name = name
        self.version = version
        self.session = sessions[0]
        self.signature = signature
        self.options = options
        self.metrics = metrics
        self.run_rows = options.run_rows or options.limits.max_batch_rows
        slice_rows = self.run_rows if options.row_independent and signature.batchable else 0
        self.queue = BatchQueue[AnyRequest](options.limits, run_time, options.instances, slice_rows)
        shared = options.instances > len(sessions)
        runners = [BatchRunner(s, signature, self.run_rows, options.row_independent, shared) for s in sessions]
        self._runner = runners[0]
        self._admission = admission
        self._clock = clock
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._idle = options.instances
        self.last_used = clock()  # when it was made, or its last run ended
        self._ending = False  # the threads end when the queue is empty
        self._closed = False  # new requests are rejected
        self._inline = options.inline_run_limit > 0 and options.instances == 1 and not options.limits.delay
        self._inline &= not self.session.own_thread
        self._rejections = Rejections(metrics, admission, clock)
        self._runs = Runs(metrics, clock, lost, options.shrink_arena)
        label = f"{name}/{version}"
        self._threads = WorkerThreads(label, self._wake, runners, options.instances, self._serve, IDLE_SECONDS)

    def start(self) -> None:
        with self._lock:
            self._threads.start()

    # -- called by transports -----------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[AnyRequest], now: float) -> None:
        """Queue admitted requests. Never blocks; rejected ones are answered here. Must be followed by `run_pending`."""
        with self._lock:
            if self._closed:
                refused = [Settled(r, being_replaced(self.name, self.version)) for r in requests]
            else:
                refused = self.queue.offer(requests, now)
        if refused:
            self._rejections.reject(refused)

    @property
    def saturated(self) -> bool:
        """Whether a new request must wait for a full queued batch. Read without the lock, so only a hint."""
        return not self._idle and self.queue.rows >= self.queue.limits.max_batch_rows

    @property
    def slack(self) -> float:
        """Estimated seconds until a new request can start: half a full batch while busy, else 0. Only a hint."""
        if self._idle and not len(self.queue):
            return 0.0
        return self.queue.run_time.predict(self.queue.limits.max_batch_rows) / 2

    @property
    def next_run_seconds(self) -> float:
        """Predicted seconds of the next run. Only a hint."""
        return self.queue.next_seconds

    def run_pending(self) -> bool:
        """Run the next batch on this thread if that is quicker than waking another; otherwise wake one.

        True: requests are left that no other thread will run; call again after submitting newly arrived requests.
        """
        with self._lock:
            queue = self.queue
            if not self._idle or not len(queue):
                return False
            slow = not self._inline or queue.next_seconds > self.options.inline_run_limit
            if slow and self._threads.call():
                return False
            batch = self._take()
        if batch is not None:
            self._run(batch, self._runner)
        return bool(len(self.queue))

    def try_run_now(self, request: AnyRequest, now: float) -> bool:
        """Run an admitted request on this thread if nothing waits and a slot is free; False: `submit` it instead.

        Equivalent to `submit` and `run_pending` for a lone request, but skips the queue: half the overhead.
        """
        with self._lock:
            run_time = self.queue.run_time
            if (
                not self._inline
                or self._idle != 1
                or self.queue.requests
                or self.queue.large.requests
                or self._ending
                or request.deadline < now + run_time.lower_bound(request.rows)
                or run_time.predict(request.rows) > self.options.inline_run_limit
            ):
                return False
            self._idle = 0
        request.state = RUNNING
        matrices: list[int] = []
        taken = self._clock()
        answers, run, failed = self._runs.answers([request], self._runner, matrices)
        ended = self._clock()
        request.state = SETTLED
        late = request.deadline < ended and reject_late([request], answers, ended)
        timing = BatchTiming(taken, run, ended, sum(matrices)) if request.timings else None
        deliver(self.name, [request], answers, timing)
        # From here on no client waits: responses are sent before accounting.
        with self._lock:
            self._free_slot(ended)
            if not failed:
                count = len(matrices)
                rows, seconds = request.rows, ended - taken
                run_time.observe(rows, seconds) if count == 1 else run_time.observe(rows // count, seconds / count)
        if failed or late:
            count_errors(self.metrics, answers)
        note = BatchRecord(((request.arrival, 1),), matrices, taken, run, self._clock(), 0 if failed or late else 1)
        self.metrics.ran(note)
        if self.metrics.flight is not None:
            record_single(self.metrics.flight, request, answers[0], ended, note)
        if self.metrics.access is not None:
            log_requests(self.metrics.access, self.metrics.labels, [request], answers, (True,), note)
        if self.metrics.tracing is not None:
            trace_batch(self.metrics, [request], answers, (True,), note, ended)
        self._admission.release(1, request.nbytes)
        return True

    def cancel(self, request: AnyRequest) -> None:
        """Cancel `request`, whose client no longer waits."""
        with self._lock:
            settled = self.queue.cancel(request)
        if settled:
            self.metrics.refused("CANCELLED", Reason.CANCELLED)
            if self.metrics.tracing is not None:
                trace_refused(self.metrics.tracing, self.metrics.labels, [request], [None], self._clock())
            self._admission.release(1, request.nbytes)

    # -- the threads --------------------------------------------------------------------------------------------------

    def _serve(self, runner: BatchRunner, instance: int) -> None:
        while True:
            with self._lock:
                batch = self._next()
                if batch is None:
                    self._threads.ended(instance)
                    return
            try:
                self._run(batch, runner, instance)
            except Exception:  # if this thread ended, later requests would wait forever
                logger.exception("model %s version %s: a batch could not be settled", self.name, self.version)

    def _next(self) -> Batch[AnyRequest] | None:
        """Wait for a slot and a batch that may close. None: the thread must end, and the queue is empty. Lock held."""
        while True:
            now = self._clock()
            closes = self.queue.closes_at(now)
            if self._idle and (closes <= now or (self._ending and len(self.queue))):
                batch = self._take()
                if batch is not None:
                    return batch
                continue
            if self._ending and not len(self.queue):
                return None
            nothing = closes == float("inf") or not self._idle
            if not self._threads.wait(None if nothing else max(0.0, closes - now)) and not len(self.queue):
                return None

    def _take(self) -> Batch[AnyRequest] | None:
        """Take a batch and a slot for it. Lock held."""
        now = self._clock()
        queue = self.queue
        batch = queue.take(now)
        if batch is None:
            return None
        self._idle -= 1
        if batch.rows and self.options.instances == 1:
            queue.busy_until = now + queue.run_time.lower_bound(batch.rows)
        if self._idle and len(queue):
            self._threads.call()
        if batch.turn is not None and not batch.turn.start:
            (request,) = batch.requests
            request.large_run = LargeRun(request.template, request.buffers, now)
        return batch

    def _run(self, batch: Batch[AnyRequest], runner: BatchRunner, instance: int = RECEIVER) -> None:
        """Run a batch, answer its requests and free its slot."""
        requests = batch.requests
        if batch.dropped:
            self._rejections.reject(batch.dropped)
        if not requests:
            self._give_back(batch, self.queue.free_since)
            return
        if batch.turn is not None:
            self._run_turn(batch, batch.turn, runner, instance)
            return
        matrices: list[int] = []
        answers, run, failed = self._runs.answers(requests, runner, matrices)
        ended = self._clock()
        owed = self._give_back(batch, ended)
        timing = BatchTiming(batch.taken, run, ended, sum(matrices))
        late = reject_late(requests, answers, ended)
        told: Sequence[AnyRequest] = requests
        sent, answered, nbytes = answers, len(requests), batch.nbytes
        if not all(owed):
            kept = [i for i, is_owed in enumerate(owed) if is_owed]
            told, sent, answered = [requests[i] for i in kept], [answers[i] for i in kept], len(kept)
            nbytes = sum([request.nbytes for request in told])
        deliver(self.name, told, sent, timing)
        answered -= count_errors(self.metrics, sent) if failed or late else 0
        note = BatchRecord(waits_of(requests), matrices, timing.taken, timing.run, self._clock(), answered)
        self.metrics.ran(note)
        if self.metrics.flight is not None:
            record_batch(self.metrics.flight, batch, note, ended, instance, answers=answers, owed=owed)
        if self.metrics.access is not None:
            log_requests(self.metrics.access, self.metrics.labels, requests, answers, owed, note)
        if self.metrics.tracing is not None:
            trace_batch(self.metrics, requests, answers, owed, note, ended, closed=batch.closed, instance=instance)
        self._admission.release(len(told), nbytes)
        if not failed:
            with self._lock:
                count = len(matrices)
                self.queue.run_time.observe(batch.rows // count, (ended - batch.taken) / count)

    def _run_turn(
        self, batch: Batch[AnyRequest], turn: LargeTurn[AnyRequest], runner: BatchRunner, instance: int
    ) -> None:
        """Run a turn of a large request and free its slot; answer the request after its last turn, or if one failed."""
        request, run = turn.request, turn.request.large_run
        matrices: list[int] = []
        seconds, following = 0.0, turn
        while True:
            error, took = self._runs.turn(following, runner, matrices)
            seconds += took
            ended = self._clock()
            with self._lock:
                more = self.queue.extend_turn(batch, ended, instance != RECEIVER) if error is None else None
                if more is None:
                    owed, last = self.queue.finish_turn(batch, error is not None)
                    self._free_slot(ended)
                    run.ran(matrices, seconds)
                    if error is None:
                        count = len(matrices)
                        self.queue.run_time.observe(batch.rows // count, (ended - batch.taken) / count)
                    break
            following = more
        answers: list[Answer] = []
        if owed:
            answers = [error if error is not None else self._runs.large_answer(request, runner)]
            ended = self._clock()
            reject_late([request], answers, ended)
            deliver(self.name, [request], answers, run.timing(ended))
        failed = count_errors(self.metrics, answers)
        note = run.note(request.arrival, ended, self._clock(), len(answers) - failed)
        if last:
            self.metrics.ran(note)
        if self.metrics.flight is not None:
            record_turn(self.metrics.flight, batch, (matrices, seconds, ended, note.done), instance, answers)
        if not owed:
            return
        if self.metrics.access is not None:
            log_requests(self.metrics.access, self.metrics.labels, [request], answers, (True,), note)
        if self.metrics.tracing is not None:
            trace_batch(self.metrics, [request], answers, (True,), note, ended, closed=batch.closed, instance=instance)
        self._admission.release(1, request.nbytes)

    def _give_back(self, batch: Batch[AnyRequest], ended: float) -> list[bool]:
        with self._lock:
            owed = self.queue.finish(batch)
            self._free_slot(ended)
            return owed

    def _free_slot(self, ended: float) -> None:
        """Lock held."""
        if not self._idle:
            self.queue.free_since = ended
        self._idle += 1
        self.last_used = ended
        if self._ending or (self.options.instances > 1 and len(self.queue)):
            self._wake.notify_all()

    # -- its end ------------------------------------------------------------------------------------------------------

    def end_runs_since(self, limit: float) -> int:
        """End every run that began before `limit` seconds on the clock, and return their number. For the watchdog."""
        return self._runs.end_since(limit)

    def reject_timed_out(self) -> None:
        """Reject the requests whose queue timeout ended while every instance is busy. For the watchdog."""
        with self._lock:
            expired = [] if self._idle else self.queue.expire(self._clock())
        if expired:
            self._rejections.reject(expired)

    @property
    def has_timeouts(self) -> bool:
        """Whether requests with a queue timeout may arrive or wait. Read without the lock, so only a hint."""
        return self.options.queue_timeouts is not None or self.queue.has_timeouts

    @property
    def busy(self) -> bool:
        """Whether requests wait or run. Read without the lock, so only a hint."""
        return self._idle < self.options.instances or bool(len(self.queue))

    @property
    def is_idle(self) -> bool:
        """Whether it has neither threads nor requests, so that closing it takes no time."""
        with self._lock:
            return not (self._threads.serving or len(self.queue) or self._runs.running)

    def close(self, seconds: float) -> bool:
        """Finish queued requests within `seconds`, reject all others. Returns whether all threads ended in time."""
        with self._lock:
            self._closed = True
        ended = self.retire(seconds)
        with self._lock:
            left = self.queue.clear()
            self._wake.notify_all()
        if left:
            self._rejections.reject([Settled(r, being_replaced(self.name, self.version)) for r in left])
        return ended

    def retire(self, seconds: float) -> bool:
        """Finish queued requests and end the threads; returns whether in time. Later ones run on submitting threads."""
        with self._lock:
            if len(self.queue):
                self._threads.call()  # whoever queued them may be ending as well
            self._ending = True
            threads = self._threads.end()
        until = self._clock() + seconds
        for thread in threads:
            thread.join(max(0.0, until - self._clock()))
        return not any(t.is_alive() for t in threads)
