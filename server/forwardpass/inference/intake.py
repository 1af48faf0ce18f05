"""From a transport's calls to the workers' queues: decode, admit, submit in groups, then run what is pending.

Every transport has an Intake as its RequestSink, so that all accept, reject and count in the same way.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Generic, Protocol, TypeVar, cast

from forwardpass.batching.admission import Admission
from forwardpass.errors import Reason, RequestError, RunFailed
from forwardpass.execution.stacking import Buffer
from forwardpass.inference import decoder
from forwardpass.inference.accounting import log_refused, log_undecoded, origin_of
from forwardpass.inference.decode_thread import DecodeThread
from forwardpass.inference.decoder import Decoder, ParsedMessage, SharedMemory
from forwardpass.inference.load_waits import HeldCall, LoadWaits
from forwardpass.inference.request import InferenceRequest, RejectedRequest, TimedInferenceRequest
from forwardpass.inference.request_template import RequestTemplate
from forwardpass.inference.request_traces import trace_refused, trace_undecoded
from forwardpass.inference.worker import Worker
from forwardpass.observability.log_limit import LogLimit
from forwardpass.observability.model_metrics import ModelMetrics
from forwardpass.transport.interface import Message, PendingRequest, ReplySink, Room
from forwardpass.transport.memory_budget import Holding, no_room

CallT = TypeVar("CallT")

ELSEWHERE: Final = 64 << 10  # bytes of an unknown message from which another thread decodes it
# A network that takes less than so many seconds a row loses much of its time to reading calls that it can't serve.
QUICK: Final = 400e-6
AHEAD: Final = (
    10e-3  # seconds of runs, or two full batches, that wait at least for such a model before calls stay unread
)

logger = logging.getLogger(__name__)
logger.addFilter(LogLimit())


class WorkerLookup(decoder.ModelLookup, Protocol):
    """Resolves a model to its worker: the repository."""

    def resolve(self, name: str, version: str) -> Worker: ...


def _room(worker: Worker, most: int) -> int:
    """How many calls for a saturated model to read, at most `most`: as many as its queue's order may be about."""
    queue, options = worker.queue, worker.options
    batch = queue.limits.max_batch_rows
    seconds = queue.run_time.predict(batch) / options.instances
    if options.priority_levels > 1 or seconds > QUICK * batch or seconds <= 0:
        return most
    return max(0, int(batch * max(2.0, AHEAD / seconds)) - queue.rows)


class Intake(Generic[CallT]):
    """A RequestSink. Not thread-safe: each transport has its own, used by one thread."""

    def __init__(
        self,
        reply_sink: ReplySink[CallT],
        models: WorkerLookup,
        admission: Admission,
        metrics: ModelMetrics,
        max_message_bytes: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        regions: SharedMemory | None = None,
        waits: LoadWaits | None = None,
    ) -> None:
        """`regions` None: shared memory is turned off. `waits` None: no call waits for its model to be loaded."""
        self._reply_sink = reply_sink
        self._decoder = Decoder(models, max_message_bytes, regions)
        self._admission = admission
        self._metrics = metrics  # for calls that belong to no model
        self._waits = waits
        self._clock = clock
        self._groups: dict[Worker, list[InferenceRequest[CallT]]] = {}
        self._pending: list[Worker] = []  # on which this thread must call `run_pending` again
        self._decode_thread = DecodeThread()
        self.decoding = 0  # messages that another thread has, or that wait; the transport counts them down
        self.resume: Callable[[CallT, Callable[[], PendingRequest[CallT] | None]], None] | None = None
        self.before_run: Callable[[float], None] | None = None  # called with the seconds of a run that follows another
        self.now = clock()
        self.saturated = False  # whether all requests of the last flush are for saturated models
        self._last: Sequence[Worker] = ()  # the models of the last group of calls
        self._crowded: Sequence[Worker] = ()  # saturated models of the last saturated flush, while busy

    def begin(self) -> None:
        """Begin a group of calls, which share one time of arrival."""
        self.now = self._clock()
        self.saturated = False
        self._decoder.refresh()

    def take(
        self,
        call: CallT,
        message: Message,
        seconds_left: float | None,
        timings: bool = False,
        room: Room | None = None,
        waited: bool = False,
    ) -> PendingRequest[CallT] | None:
        """Decode one call's message. None: it was rejected, and has been answered; or another thread decodes it.

        What is returned for a call that must wait for its model's load is no request yet, but cancels the call.
        `waited`: it has.
        """
        whole = b""
        try:
            found = self._decoder.find(message) if type(message) is bytes else None
            if found is None:
                if room is not None and self.resume is not None and len(message) >= ELSEWHERE:
                    self._decode_elsewhere(call, message, (self.now, seconds_left, timings), room, waited)
                    return None
                whole = message if isinstance(message, bytes) else message.inflate()
                found = self._decoder.decode(whole)
            template, buffers, id_field = found
            if template.answer_bytes and room is not None and not room.reserve(template.answer_bytes):
                raise no_room(template.answer_bytes)
        except RequestError as error:
            if error.model is not None and not waited:
                return self._hold(HeldCall(call, whole, (self.now, seconds_left, timings), room), error)
            self.refuse(call, error)
            return None
        except Exception:
            logger.exception("a request could not be decoded")
            self.refuse(call, RunFailed("internal error; the server's log has the details"))
            return None
        return self._enqueue(call, template, buffers, id_field, len(message) + template.shared, seconds_left, timings)

    def _hold(self, held: HeldCall[CallT], error: RequestError) -> PendingRequest[CallT] | None:
        """Have a call wait for its model, or reject it with `error` or the reason why it can't wait."""
        waits, resume = self._waits, self.resume
        refused: RequestError | None = error
        if waits is not None and resume is not None:
            self.decoding += 1
            refused = waits.hold(held, error, lambda ended: resume(held.call, partial(self._resume, held, ended)))
            if refused is None:
                held.cancelled = self._cancel_held
                return held
            self.decoding -= 1
        assert refused is not None
        self.refuse(held.call, refused)
        return None

    def _cancel_held(self) -> None:
        self.decoding -= 1
        self._metrics.refused("CANCELLED", Reason.CANCELLED)

    def _resume(self, held: HeldCall[CallT], error: RequestError | None) -> PendingRequest[CallT] | None:
        """As `take`, once a call's wait is over."""
        message, held.message = held.message, b""
        if error is not None:
            self.refuse(held.call, error)
            return None
        now, self.now = self.now, held.arrival
        try:
            return self.take(held.call, message, held.seconds_left, held.timings, held.room, waited=True)
        finally:
            self.now = now

    def _decode_elsewhere(
        self, call: CallT, message: Message, how: tuple[float, float | None, bool], room: Room, waited: bool
    ) -> None:
        """Have a large message decoded by another thread. Raises Overloaded if there is no room for it."""
        holding = Holding(room.share)
        if not holding.resize(len(message)):
            raise no_room(len(message))
        resume = self.resume
        assert resume is not None
        self.decoding += 1

        def work() -> None:
            whole = b""
            parsed: ParsedMessage | RequestError
            try:
                whole = message if isinstance(message, bytes) else message.inflate()
                if not holding.resize(len(whole)):
                    raise no_room(len(whole))
                parsed = self._decoder.parse(whole)
            except RequestError as error:
                parsed = error.with_traceback(None)
            except Exception:
                logger.exception("a request could not be decoded")
                parsed = RunFailed("internal error; the server's log has the details")
            resume(call, partial(self._take_decoded, HeldCall(call, whole, how, room), parsed, waited))
            holding.release()

        self._decode_thread.submit(room.share, work)

    def _take_decoded(
        self, decoded: HeldCall[CallT], parsed: ParsedMessage | RequestError, waited: bool
    ) -> PendingRequest[CallT] | None:
        """As `take`, once another thread has decoded the message."""
        if isinstance(parsed, RequestError):
            if parsed.model is not None and not waited:
                return self._hold(decoded, parsed)
            self.refuse(decoded.call, parsed)
            return None
        call, message, room = decoded.call, decoded.message, decoded.room
        self._decoder.remember(message, parsed)
        template = parsed.template
        if template.answer_bytes and room is not None and not room.reserve(template.answer_bytes):
            self.refuse(call, no_room(template.answer_bytes))
            return None
        now, self.now = self.now, decoded.arrival
        try:
            nbytes, seconds_left = len(message) + template.shared, decoded.seconds_left
            return self._enqueue(call, template, parsed.buffers, parsed.id_field, nbytes, seconds_left, decoded.timings)
        finally:
            self.now = now

    def _enqueue(
        self,
        call: CallT,
        template: RequestTemplate,
        buffers: Sequence[Buffer],
        id_field: bytes,
        nbytes: int,
        seconds_left: float | None,
        timings: bool,
    ) -> InferenceRequest[CallT]:
        """Add a decoded request to the group of its model."""
        # Set by `resolve` of WorkerLookup, which returns a Worker.
        worker: Worker = template.target  # type: ignore[assignment]
        deadline = math.inf if seconds_left is None else self.now + seconds_left
        priority = template.priority or worker.options.default_priority
        timeouts = worker.options.queue_timeouts
        wait = template.timeout if timeouts is None else timeouts[priority].of(template.timeout)
        request = (InferenceRequest if wait == math.inf else TimedInferenceRequest)(
            template,
            buffers,
            template.rows or 1,
            nbytes,
            self.now,
            deadline,
            priority,
            self._reply_sink,
            call,
            timings,
            id_field,
        )
        if wait != math.inf:
            cast("TimedInferenceRequest[CallT]", request).start_by = self.now + wait
        group = self._groups.get(worker)
        if group is None:
            self._groups[worker] = [request]
        else:
            group.append(request)
        return request

    def flush(self) -> None:
        """Submit the requests taken since `begin`."""
        if not self._groups:
            return
        groups, self._groups = self._groups, {}
        self._last = tuple(groups)  # not the requests, which must be freed once they are answered
        self.saturated = True
        spent = self._clock() - self.now
        total = sum(map(len, groups.values())) if len(groups) > 1 else 0
        for worker, requests in groups.items():
            count = len(requests)
            nbytes = sum([r.nbytes for r in requests]) if count > 1 else requests[0].nbytes
            if worker.metrics.tracing is not None:
                for request in requests:
                    request.decoded = self.now + spent
            error = self._admission.admit(count, nbytes)
            settled = False
            if error is not None:
                self._one_by_one(worker, requests)
            elif count == 1 and self._try_run_now(worker, requests[0], len(groups) > 1):
                settled = not len(worker.queue)  # unless another transport has queued requests meanwhile
            else:
                worker.submit(requests, self.now)
            self.saturated = self.saturated and worker.saturated
            worker.metrics.decoded(count, spent * count / (total or count))
            if not settled and worker not in self._pending:
                self._pending.append(worker)
        if self.saturated:
            self._crowded = self._last
        elif self._crowded:
            self._crowded = [worker for worker in self._crowded if worker.slack]

    def run_pending(self) -> bool:
        """Run this thread's share, one batch per model. True: call again, after checking for new arrivals."""
        if len(self._pending) > 1 and self.before_run is not None:
            left = []
            for worker in self._pending:
                self.before_run(worker.next_run_seconds)
                if worker.run_pending():
                    left.append(worker)
            self._pending = left
        elif self._pending:
            self._pending = [worker for worker in self._pending if worker.run_pending()]
        return bool(self._pending)

    def _try_run_now(self, worker: Worker, request: InferenceRequest[CallT], one_of_several: bool) -> bool:
        if one_of_several and self.before_run is not None:
            self.before_run(worker.next_run_seconds)
        return worker.try_run_now(request, self.now)

    @property
    def slack(self) -> float:
        """Estimated seconds until a new request can start, if it is for the models that were saturated last."""
        return min([worker.slack for worker in self._crowded], default=0.0)

    def room(self, most: int) -> int:
        """How many calls to read next, at most `most`; 0 if what waits for the models saturated last is enough."""
        return min([most, *(_room(worker, most) for worker in self._crowded)])

    @property
    def mixed(self) -> bool:
        """Whether the last calls were for some models while others are saturated."""
        others = [worker for worker in self._crowded if worker not in self._last]
        return any(worker.saturated for worker in others)

    @property
    def full(self) -> bool:
        """Whether a full batch waits for this thread."""
        return any(w.queue.rows >= w.queue.limits.max_batch_rows for w in self._pending)

    def _one_by_one(self, worker: Worker, requests: Sequence[InferenceRequest[CallT]]) -> None:
        """Admit what fits of a group that as a whole exceeds the server's bounds."""
        for request in requests:
            error = self._admission.admit(1, request.nbytes)
            if error is None:
                worker.submit([request], self.now)
            else:
                worker.metrics.refused(error.status.name, error.reason, text=str(error))
                if worker.metrics.access is not None:
                    log_refused(worker.metrics.access, worker.metrics.labels, [request], [error], self._clock())
                if worker.metrics.tracing is not None:
                    trace_refused(worker.metrics.tracing, worker.metrics.labels, [request], [error], self._clock())
                self._reply_sink.deliver([request], [error], None)

    def refuse(self, call: CallT, error: RequestError) -> None:
        """Answer a call with an error without decoding it, and count the error."""
        self.refuse_all([call], error)

    def refuse_all(self, calls: Sequence[CallT], error: RequestError) -> None:
        """The same for several calls at once, at a fraction of the cost of each."""
        # Its frames hold this group's messages, and may do so until the cycle collector comes: the error is an answer.
        error.__traceback__ = error.__context__ = None
        self._metrics.refused(error.status.name, error.reason, len(calls), text=str(error))
        if self._metrics.access is not None:
            for call in calls:
                log_undecoded(self._metrics.access, error, origin_of(self._reply_sink, call))
        if self._metrics.tracing is not None:
            for call in calls:
                origin = origin_of(self._reply_sink, call)
                trace_undecoded(self._metrics.tracing, error, origin, (self.now, self._clock()))
        now = self.now
        self._reply_sink.deliver([RejectedRequest(call, now) for call in calls], [error] * len(calls), None)

    def count_refused(self, calls: int, error: RequestError) -> None:
        """Count calls that the transport has rejected by itself."""
        self._metrics.refused(error.status.name, error.reason, calls, text=str(error))
