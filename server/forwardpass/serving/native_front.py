"""The fast door: unary ModelInfer on the plaintext port, with HTTP/2 outside the interpreter's lock (pygrpc-native).

Every other method of the port goes through its fallback to the grpcio door, on a Unix socket. One thread receives
calls in groups, decodes and queues them, and runs short batches itself. What pygrpc-native leaves unbounded is
bounded here as far as it can be: a message's size is checked once it is in memory (not before), calls and bytes in
flight by admission.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from os import sched_yield
from time import monotonic, sleep
from typing import Any

from forwardpass.errors import RequestError
from forwardpass.serving import protocol
from forwardpass.serving.auth import Role, Tokens
from forwardpass.serving.intake import TIMINGS_KEY, Intake
from forwardpass.serving.request import Request, Timing
from forwardpass.serving.status import status_of
from forwardpass.serving.threads import Pace, named, set_pace
from forwardpass.serving.worker import Answer, Worker

logger = logging.getLogger(__name__)

try:
    from pygrpc_native import EVENT_CALL, NativeGrpcFront

    AVAILABLE = True
except ImportError:  # pragma: no cover - where there is no wheel of it
    AVAILABLE = False

IO_THREADS = "grpc-native-io"  # how pygrpc-native names its threads
POLL_SECONDS = 200e-6  # how long a receiving thread that is being kept busy asks for more before it sleeps
GATHER_SECONDS = 500e-6  # how long arrivals for saturated models gather before they are received, at least
LONGEST_GATHER = 2e-3  # and at most
MIXED_SECONDS = 1.0  # for how long nothing gathers once calls came for one model while another was saturated
FEW = 2  # events in a group up to which it is polled for
TOGETHER = 64  # answers that are handed out in one go; while more are, the first ones are on their way
CANCELLED_GROUPS = 16  # groups in a row that are taken for the sake of those that were cancelled
GROUP = 256  # calls taken in one go: enough to fill several batches, little enough to keep the first one's wait short


class NativeFront:
    """Owns the listening port, its I/O threads and one receiving thread.

    - Every call that was received is answered once, or was cancelled by its client.
    - `deliver` may be called from any thread.
    """

    def __init__(
        self,
        address: str,
        io_threads: int,
        max_streams: int,
        max_metadata_bytes: int,
        make_intake: Callable[[NativeFront], Intake],
        tokens: Tokens | None = None,
    ) -> None:
        """`tokens` None: whoever reaches the port may call."""
        self._front = NativeGrpcFront(
            address,
            [(protocol.METHODS["ModelInfer"].path, False)],
            io_threads=io_threads,
            call_details=True,
            max_concurrent_streams=max_streams,
            max_metadata_size=max_metadata_bytes,
        )
        self.port: int = self._front.bound_port
        self._calls: dict[int, Request] = {}  # by the transport's id: what EVENT_CANCEL speaks of
        self._intake = make_intake(self)
        self._tokens = tokens
        self._brisk = False  # whether the last wait was shorter than POLL_SECONDS
        self._pace = self._rest = Pace.USUAL  # of those who read and write: now, and by default
        self._gathered = 0.0  # seconds for which calls were left unread lately
        self._mixed_until = 0.0
        self._io_threads: list[int] | None = None
        self._thread = threading.Thread(target=self._receive, name="native-front", daemon=True)

    def start(self, fallback: str) -> None:
        """Listen. `fallback`: path of the Unix socket where every other method is served."""
        self._front.set_fallback(fallback)
        self._front.start()
        self._thread.start()

    def close(self) -> None:
        """Close every connection and end the threads. Call once everything in flight was answered."""
        self._front.close()
        self._thread.join(5.0)

    def deliver(self, requests: Sequence[Request], answers: Sequence[Answer], timing: Timing | None) -> None:
        respond = self._front.respond
        forget = self._calls.pop
        left = TOGETHER
        for request, answer in zip(requests, answers, strict=True):
            call = request.call
            forget(call, None)
            if answer.__class__ is bytes:
                if request.timings and timing is not None:
                    respond(call, answer, None, timing.trailers(request.arrival))
                else:
                    respond(call, answer)
            else:
                assert isinstance(answer, RequestError)
                code, text, trailers = status_of(answer)
                self._front.fail(call, code, text, trailers)
            left -= 1
            if not left and self._pace is Pace.PATIENT:
                sched_yield()
                left = TOGETHER
        if self._brisk and len(requests) == 1:
            sched_yield()  # it leaves now, not after the accounts have been kept
        elif self._pace is Pace.PATIENT and threading.get_ident() != self._thread.ident:
            sched_yield()  # a thread that goes on to compute lets those in who send the answers

    def _receive(self) -> None:
        front, intake = self._front, self._intake
        more = False
        while True:
            # While this thread has batches of its own to run it only looks for what has arrived meanwhile.
            events = front.recv_batch_details(GROUP, 0) if more else self._wait()
            if events is None:
                return
            try:
                if events:
                    groups = 1
                    while self._take(events) and len(events) == GROUP and groups < CANCELLED_GROUPS:
                        # A client of many calls has gone: they are to be out of the queue before it is looked at.
                        following = front.recv_batch_details(GROUP, 0)
                        if not following:
                            break
                        events, groups = following, groups + 1
                    self._set_pace(self._fitting(len(events)))
                more = intake.step()
                if more and intake.full:
                    # What arrives meanwhile waits behind these batches anyway.
                    until = monotonic() + GATHER_SECONDS
                    while more and intake.full and monotonic() < until:
                        more = intake.step()
                if self._pace is Pace.PATIENT:
                    sched_yield()  # now the answers leave, all of them, and what has come meanwhile is read
            except Exception:
                logger.exception("the native door failed on a group of %d events", len(events))

    def _fitting(self, calls: int) -> Pace:
        """How those who read and write are to be let in, after a group of `calls`."""
        intake = self._intake
        if intake.mixed:
            self._mixed_until = intake.now + MIXED_SECONDS
        if intake.saturated and intake.now > self._mixed_until and self._rest is Pace.HURRIED:
            # Nothing that arrives now can run soon, and reading and receiving it call by call would take much of the
            # core from the runs: a switch of threads for each. In groups it takes a fraction of that.
            return Pace.PATIENT
        if calls > FEW and intake.sole:
            return Pace.PATIENT  # this thread computes itself, and is to be left alone until all answers are out
        if intake.saturated and self._rest is Pace.USUAL:
            # From now on whoever receives and answers is not to wait behind a thread that computes.
            self._rest = Pace.HURRIED
            set_pace([threading.get_native_id()], Pace.HURRIED)
        return self._rest

    def _set_pace(self, pace: Pace) -> None:
        if pace is self._pace:
            return
        if self._io_threads is None:
            self._io_threads = named(IO_THREADS)
        set_pace(self._io_threads, pace)
        self._pace = pace
        self._gathered = 0.0

    def _wait(self) -> Any:
        """The next group of events. Sleeps for it, unless the last one came so soon that asking again is quicker.

        Going to sleep and being woken takes longer than a small network's run, on a virtual machine above all. Every
        poll yields the core and the interpreter, and one that was in vain is not repeated before calls come fast again:
        an idle server sleeps.
        """
        front = self._front
        while self._pace is Pace.PATIENT:
            events = front.recv_batch_details(GROUP, 0)
            if events or events is None:
                return events
            slack = self._intake.slack
            if slack:
                self._gathered = min(max(slack, GATHER_SECONDS), LONGEST_GATHER)
                sleep(self._gathered)
                sched_yield()
            else:
                self._set_pace(self._rest)
        began = monotonic()
        if self._brisk:
            until = began + POLL_SECONDS
            while monotonic() < until:
                events = front.recv_batch_details(GROUP, 0)
                if events or events is None:
                    break
                sched_yield()
            else:
                events = front.recv_batch_details(GROUP)
        else:
            events = front.recv_batch_details(GROUP)
        # Calls that come in groups are worth waiting for: polling would take the core from the threads that read them.
        self._brisk = len(events or ()) in range(1, FEW + 1) and monotonic() - began < POLL_SECONDS
        return events

    def _take(self, events: Sequence[Any]) -> bool:
        """Queue the calls among `events`, and take those that were cancelled out. Whether there were such."""
        intake, calls, tokens = self._intake, self._calls, self._tokens
        take = intake.take
        intake.begin()
        gone: list[int] = []
        # A call's clock begins to run when it is read. On average it had lain there for half of that time.
        unread = 0.5 * self._gathered
        for kind, call, _, message, _, details in events:
            if kind != EVENT_CALL:
                gone.append(call)
                continue
            metadata, _, seconds_left = details
            if tokens is not None:
                refusal = tokens.refusal(metadata, Role.INFER)
                if refusal is not None:
                    intake.refuse(call, refusal)
                    continue
            if seconds_left is not None:
                seconds_left -= unread
            timings = False
            for key, value in metadata:
                if key == TIMINGS_KEY:
                    timings = value != "0"
            request = take(call, message, seconds_left, timings)
            if request is not None:
                calls[call] = request
        intake.flush()
        for call in gone:
            request = calls.pop(call, None)
            if request is not None:
                worker: Worker = request.header.target
                worker.cancel(request)
        return bool(gone)
