"""The direct transport: the gRPC port, with HTTP/2 in this process (libnghttp2) instead of a gRPC server library.

One thread reads what clients send, decodes and queues their ModelInfer calls, runs short batches itself and writes the
responses: a small network's request never changes threads. Other methods go to the event loop. Responses that leave
together are one write.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from os import sched_yield
from time import monotonic, sleep

from forwardpass import protocol
from forwardpass.errors import DeadlineExceeded, Overloaded, Reason, RequestError, Unread
from forwardpass.observability.access_log import Origin
from forwardpass.observability.log_limit import LogLimit
from forwardpass.protocol.status import status_of
from forwardpass.protocol.timings import BatchTiming
from forwardpass.transport.handed_listener import HandedListener
from forwardpass.transport.http2.backlog import MARGIN, is_late
from forwardpass.transport.http2.call_context import Http2CallContext
from forwardpass.transport.http2.connection import Connection
from forwardpass.transport.http2.decoded_calls import DecodedCalls
from forwardpass.transport.http2.limits import Http2Limits
from forwardpass.transport.http2.loop_mailbox import LoopMailbox
from forwardpass.transport.http2.peer import Peer, Tls
from forwardpass.transport.http2.request_head import RequestHead
from forwardpass.transport.http2.send_side import SendSide, ServerStream, StreamListener
from forwardpass.transport.http2.sockets import CLOSE_SECONDS, Sockets
from forwardpass.transport.http2.thread_priority import schedule_promptly
from forwardpass.transport.interface import (
    Answer,
    Authorize,
    Handlers,
    Metadata,
    PendingRequest,
    ReplySink,
    RequestSink,
)
from forwardpass.transport.listeners import ListenerGone
from forwardpass.transport.memory_budget import MemoryBudget

logger = logging.getLogger(__name__)
logger.addFilter(LogLimit())

INFER_PATH = protocol.METHODS["ModelInfer"].path.encode()

GROUP = 256  # calls taken in one go: enough to fill several batches, few enough to keep the first one's wait short
POLL_SECONDS = 200e-6  # how long a busy thread polls before it sleeps
HOLD_SECONDS = 200e-6  # that a response waits for those of other models' batches, at most
FEW = 2  # calls in a group: polling goes on only after groups of at most this size
GATHER_SECONDS = 500e-6  # how long arrivals for saturated models gather before they are read, at least
LONGEST_GATHER = 5e-3  # and at most
OVERDUE = "the server is past its capacity: the call waited too long before it could be looked at"
UNREAD_RETRY = 0.1  # seconds, sent with rejections of calls without a deadline
GATHERS = 4  # in a row, while what waits for those models takes longer than the longest
MIXED_SECONDS = 1.0  # how long gathering is off after calls came for one model while another was saturated


class Http2Server:
    """Owns the port's sockets and the thread that reads them.

    - Every received call is answered once, or cancelled by its client.
    - `deliver` may be called from any thread.
    """

    def __init__(
        self,
        host: str,
        port: int,
        bounds: Http2Limits,
        *,
        make_sink: Callable[[ReplySink[ServerStream]], RequestSink[ServerStream]],
        handlers: Handlers,
        call_soon: Callable[[Callable[[], None]], object],
        authorize: Authorize | None = None,
        tls: Tls | None = None,
        lost: Callable[[str], None] = lambda _: None,
        handed: HandedListener | None = None,
    ) -> None:
        """Bind, or take connections from `handed`. Raises OSError if that fails.

        `make_sink` makes the sink for ModelInfer; it answers by `deliver`.
        `handlers`: of the other methods, for the event loop; `call_soon` schedules a function there, from any thread.
        `authorize` None: every call of ModelInfer is allowed; handlers do their own checks.
        `tls` None: plaintext. `lost` is called with the reason, by the receiving thread, if that ends by itself.
        """
        self._lost = lost
        self._bounds = bounds
        self._budget = MemoryBudget(bounds.max_bytes)
        self._sockets = Sockets(host, port, self._connect, bounds.max_connection_age, tls, handed)
        self.port = self._sockets.port
        paths = {f"/{service}/{name}".encode(): h for service, of in handlers.items() for name, h in of.items()}
        self._handlers = {path: handler for path, handler in paths.items() if path != INFER_PATH}
        self._mailbox = LoopMailbox(call_soon)
        self._authorize = authorize
        self._sink = make_sink(self)
        self._sink.before_run = self._before_run
        self._decoded = DecodedCalls(self._sink, lambda: None if self._closing else self._sockets.wake())
        self._holding = False
        self._held: dict[SendSide, object] = {}  # connections with responses that have not left yet
        self._release_at = 0.0
        self._brisk = False  # whether the last wait was shorter than POLL_SECONDS
        self._room = GROUP  # calls to take next, at most
        self._mixed_until = 0.0
        self._hurried = False
        self._draining = self._departed = False
        self._parting = 0  # clients to ask to connect anew
        self._closing = False
        self.settled = threading.Event()  # set while draining: every call on its way has arrived
        self._thread = threading.Thread(target=self._serve, name="direct-transport", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        """Accept no more connections and ask clients to go elsewhere; calls on their way are taken until `settled`."""
        self._draining = True
        self._sockets.wake()

    def part_with(self, count: int) -> None:
        """Ask `count` clients to connect anew, so that another process may get them; their calls are served."""
        self._parting = count
        self._sockets.wake()

    def close(self) -> None:
        """Close every connection and end the thread. Call once everything in flight was answered."""
        if self._closing:
            return
        self._closing = True
        if self._thread.ident is None:
            self._sockets.close()
            return
        self._sockets.wake()
        self._thread.join(CLOSE_SECONDS + 5.0)

    # -- responses: any thread ----------------------------------------------------------------------------------------

    def deliver(
        self, requests: Sequence[PendingRequest[ServerStream]], answers: Sequence[Answer], timing: BatchTiming | None
    ) -> None:
        groups: dict[SendSide, list[tuple[ServerStream, bytes, Metadata]]] = {}
        out: SendSide | None = None
        group: list[tuple[ServerStream, bytes, Metadata]] = []
        failed: dict[SendSide, dict[RequestError, list[ServerStream]]] = {}
        for request, answer in zip(requests, answers, strict=True):
            call = request.call
            call.request = None  # which refers to this call
            if isinstance(answer, RequestError):
                failed.setdefault(call.out, {}).setdefault(answer, []).append(call)
                continue
            if call.out is not out:
                out = call.out
                group = groups.setdefault(out, [])
            group.append((call, answer, timing.trailers(request.arrival) if request.timings and timing else ()))
        holds = self._holding and threading.get_ident() == self._thread.ident
        for out, group in groups.items():
            with out.lock:
                out.respond(group, holds)
        if holds:
            self._held.update(groups)
        for out, errors in failed.items():
            with out.lock:
                for error, calls in errors.items():
                    out.fail_all(calls, *status_of(error))
                out.flush()

    def traceparents(self, requests: Sequence[PendingRequest[ServerStream]]) -> list[bytes]:
        return [request.call.head.traceparent for request in requests]

    def origin(self, call: ServerStream) -> Origin:
        """Where a call came from; its address is asked for when it is written."""
        peer: Peer = call.out.owner  # type: ignore[assignment]  # set by the sockets
        return Origin(call.head.traceparent.decode("latin-1"), peer.name, partial(_header, call.head))

    def _before_run(self, seconds: float) -> None:
        """Hold responses while another run follows. Batches of several models run one after the other for the same
        clients: responses ready within HOLD_SECONDS leave together. A run that takes longer is not waited for."""
        self._holding = True
        now = monotonic()
        if not self._held:
            self._release_at = now + HOLD_SECONDS
        elif now + seconds > self._release_at:
            self._release()
            self._holding = True
            self._release_at = monotonic() + HOLD_SECONDS

    def _release(self) -> None:
        """Send the held responses."""
        self._holding = False
        if self._held:
            held, self._held = self._held, {}
            for out in held:
                with out.lock:
                    out.flush()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        why = "its thread ended"
        try:
            self._take_turns()
        except Exception as error:
            why = str(error)
        if not self._closing:
            self._lost(f"the gRPC port serves no more: {why}")
        for connection in self._sockets.close():
            self._forget(connection)

    def _take_turns(self) -> None:
        """Serve until closed. Raises ListenerGone."""
        sink, sockets = self._sink, self._sockets
        more = False
        while not self._closing:
            try:
                # While this thread has batches of its own to run, it polls for new arrivals without waiting.
                if (sockets.poll(wait=False) if more else self._wait()) or self._decoded:
                    self._take(sockets.read(self._room))
                more = sink.run_pending()
                self._release()
                # What arrives meanwhile waits behind these batches anyway. It costs nothing unread; its age is noted.
                until = monotonic() + LONGEST_GATHER
                while more and sink.full and monotonic() < until:
                    more = sink.run_pending()
                    self._release()
                    self._note_arrivals()
            except ListenerGone:
                raise
            except Exception:
                logger.exception("the direct transport failed on a group of calls")
                self._release()
            try:
                self._take(sockets.sweep())
                if self._draining:
                    self._drain()
                if self._parting:
                    count, self._parting = self._parting, 0
                    sockets.part_with(count, "connections are spread anew")
            except ListenerGone:
                raise
            except Exception:
                logger.exception("the direct transport could not expire stalled calls")

    def _drain(self) -> None:
        if not self._departed:
            self._departed = True
            self._sockets.drain()
        if self._sockets.settled and not self._sink.decoding:
            self.settled.set()

    def _wait(self) -> int:
        """Wait for events. Returns their number. Sleeps, unless the last ones came so soon that polling is quicker.

        Going to sleep and being woken takes longer than a small network's run, above all on a virtual machine. Every
        empty poll yields the core and the interpreter, and after POLL_SECONDS of them polling stops until calls come
        fast again: an idle server sleeps.
        """
        sockets = self._sockets
        room = GROUP
        if self._hurried and self._sink.saturated and self._sink.now > self._mixed_until:
            # Nothing that arrives now can run soon, and reading it call by call would take much of the core from the
            # runs. Reading in groups takes a fraction of that; and what comes too late costs least while it is unread.
            for _ in range(GATHERS):
                slack = self._sink.slack
                if not slack:
                    room = GROUP
                    break
                sleep(min(max(slack, GATHER_SECONDS), LONGEST_GATHER))
                room = self._sink.room(GROUP)
                if room:
                    break
                self._note_arrivals()
        self._room = max(room, FEW)
        began = monotonic()
        found = 0
        if self._brisk:
            until = began + POLL_SECONDS
            while not (found := sockets.poll(wait=False)) and monotonic() < until:
                sched_yield()
        found = found or sockets.poll(wait=not self._decoded)
        self._brisk = 0 < found <= FEW and monotonic() - began < POLL_SECONDS
        return found

    def _note_arrivals(self) -> None:
        """Read what the sockets have, and leave it for later."""
        if self._sockets.poll(wait=False):
            for connection in self._sockets.read(0):
                self._forget(connection)

    def _take(self, news: Sequence[Connection]) -> None:
        """Queue the calls that arrived, and remove the cancelled ones."""
        if not news and not self._decoded:
            return
        sink, authorize, max_unread = self._sink, self._authorize, self._bounds.max_unread_seconds
        sink.begin()
        take = sink.take
        self._decoded.take()
        now = sink.now
        count = shed = 0
        overdue: list[ServerStream] = []
        for connection in news:
            cancelled, streams = connection.cancelled, connection.streams
            count += len(connection.arrived)
            arrived, connection.arrived[:] = connection.arrived[:], ()
            shed += connection.shed
            connection.shed = 0
            longest = 0.0
            refused, connection.refused[:] = connection.refused[:], ()
            try:
                for call, message in arrived:
                    if cancelled and streams.get(call.number) is not call:
                        continue
                    head = call.head
                    if authorize is not None and (refusal := authorize(head.metadata)) is not None:
                        sink.refuse(call, refusal)
                        continue
                    # A deadline counts from when the call may have been sent: a response that is late by a millisecond
                    # is worth nothing, and was made at the cost of one in time.
                    timeout, unread = head.timeout, now - call.received
                    if timeout is not None:
                        if timeout > longest:
                            longest = timeout
                        timeout -= unread
                        if timeout < MARGIN and is_late(timeout, unread):
                            overdue.append(call)
                            continue
                    else:
                        longest = max(longest, max_unread)
                        if unread > max_unread:
                            overdue.append(call)
                            continue
                    call.request = take(call, message, timeout, head.timings, call)
                connection.patience.note(longest)
                for call, error in refused:
                    sink.refuse(call, error)
            except Exception:  # its calls that were not queued would never be answered
                logger.exception("a connection is closed: its calls could not be queued")
                self._sockets.close_connection(connection)
        if overdue:
            self._refuse_overdue(overdue)
        if shed:
            sink.count_refused(shed, Unread(f"{OVERDUE}; it may be repeated"))
        sink.flush()
        for connection in news:
            if connection.cancelled:
                self._forget(connection)
        if count > FEW:
            self._brisk = False  # calls that come in groups are worth waiting for
        if sink.mixed:
            self._mixed_until = sink.now + MIXED_SECONDS
        if sink.saturated and not self._hurried:
            # From now on the receiving thread must not wait behind a thread that computes.
            self._hurried = True
            schedule_promptly(threading.get_native_id())

    def _refuse_overdue(self, calls: Sequence[ServerStream]) -> None:
        """Reject calls that have waited for too long before they were looked at."""
        bounded = [call for call in calls if call.head.timeout is not None]
        if bounded:
            self._sink.refuse_all(bounded, DeadlineExceeded(OVERDUE, reason=Reason.DEADLINE_UNREAD))
        if len(bounded) < len(calls):
            oldest = self._sink.now - min([call.received for call in calls])
            text = f"{OVERDUE}: {oldest:.1f} s, the bound is {self._bounds.max_unread_seconds:g} s"
            error = Overloaded(text, reason=Reason.UNREAD, retry_after=UNREAD_RETRY)
            self._sink.refuse_all([call for call in calls if call.head.timeout is None], error)

    @staticmethod
    def _forget(connection: Connection) -> None:
        """Remove cancelled calls from the queues."""
        for call in connection.cancelled:
            request, call.request = call.request, None
            if request is not None:
                request.cancel()
        connection.cancelled.clear()

    # -- connections and their other calls ----------------------------------------------------------------------------

    def _connect(self, client: Peer) -> Connection:
        return Connection(self._bounds, self._budget, INFER_PATH, self._open, self._sockets.transmit, client)

    def _open(self, call: ServerStream) -> StreamListener | None:
        handler = self._handlers.get(call.head.path)
        return None if handler is None else Http2CallContext(call, handler, self._mailbox.post)


def _header(head: RequestHead, name: str) -> str:
    return head.field(name.encode()).decode("utf-8", "replace")
