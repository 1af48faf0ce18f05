"""The interface between a transport and the layers above it: calls, method handlers, and the sink for ModelInfer.

A transport is independent of models and batches. It passes each ModelInfer call to a RequestSink, whose responses come
back through the transport's `deliver`; a call of any other method goes to the Handler of its path, on the event loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from forwardpass.errors import RequestError
from forwardpass.observability.access_log import Origin
from forwardpass.protocol.timings import BatchTiming
from forwardpass.transport.memory_budget import Share

Metadata = Sequence[tuple[str, str | bytes]]  # of a call: lower-case keys; bytes values for keys that end in -bin
Authorize = Callable[[Metadata], RequestError | None]  # the error to reject a call with this metadata; None: allowed
Answer = bytes | RequestError  # a response message, or the error sent instead

CallT = TypeVar("CallT")
CallT_co = TypeVar("CallT_co", covariant=True)
CallT_contra = TypeVar("CallT_contra", contravariant=True)


class PackedMessage(Protocol):
    """A compressed message, not inflated yet. Its length is that of what is compressed."""

    def __len__(self) -> int: ...
    def inflate(self) -> bytes:
        """Any thread may do this. Raises RequestError."""


Message = bytes | PackedMessage


class Room(Protocol):
    """A call's room in memory: for its message while another thread decodes it, then for its answer."""

    @property
    def share(self) -> Share:
        """Of its connection. Calls of one share wait for each other rather than for those of others."""

    def reserve(self, nbytes: int) -> bool:
        """Keep room for an answer of so many bytes. Returns whether there is room."""


class CallContext(Protocol):
    """One call, as its method's handler sees it. Used on the event loop only."""

    @property
    def metadata(self) -> Metadata:
        """The metadata in the client's headers."""

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the call's deadline, at least 0; None: no deadline."""

    async def read(self) -> bytes | None:
        """Return the client's next message, or None after the last one."""

    async def write(self, message: bytes) -> None:
        """Send a message. Returns when the client has room for the next one."""

    def set_trailers(self, trailers: Metadata) -> None:
        """Set the metadata to send with the status if the call succeeds."""

    @property
    def share(self) -> Share:
        """Of its connection: what its answers take until they have left."""


class Handler(NamedTuple):
    """A method's handler. `function` returns the response's only message, or None if the method `streams`.

    To end a call with a status it raises RequestError; any other exception is logged and becomes INTERNAL.
    """

    function: Callable[[CallContext], Awaitable[bytes | None]]
    streams: bool


Handlers = Mapping[str, Mapping[str, Handler]]  # by service and method


class PendingRequest(Protocol[CallT_co]):
    """A call's queued request, until it is answered."""

    @property
    def call(self) -> CallT_co: ...
    @property
    def arrival(self) -> float:
        """Time of arrival in seconds, on the monotonic clock."""

    @property
    def timings(self) -> bool:
        """Whether its response must carry the timings of its batch."""

    def cancel(self) -> None:
        """Cancel the request: its client no longer waits for it."""


class RequestSink(Protocol[CallT]):
    """The destination of ModelInfer calls. For one thread.

    Pass each arrived call to `take` between `begin` and `flush`, then call `run_pending` until it returns False.
    """

    now: float  # arrival time of the latest group of calls, on the monotonic clock
    saturated: bool  # whether every request of the last flush waits for a saturated model
    decoding: int  # large messages that another thread decodes; the transport counts each down once it is resumed
    # Called by that thread, with a call and a function. The transport must call the function on its own thread, between
    # `begin` and `flush`, if the call is still under way; it returns what `take` returns.
    resume: Callable[[CallT, Callable[[], PendingRequest[CallT] | None]], None] | None
    before_run: Callable[[float], None] | None  # called before a run that follows another, with its predicted seconds

    @property
    def slack(self) -> float:
        """Estimated seconds until a new request for the models that were saturated last can start."""

    def room(self, most: int) -> int:
        """How many calls to read next, at most `most`; 0: what waits for the models saturated last is enough."""

    @property
    def mixed(self) -> bool:
        """Whether calls came for some models while others were saturated."""

    @property
    def full(self) -> bool:
        """Whether a full batch waits for this thread."""

    def begin(self) -> None:
        """Start a group of calls that share one arrival time."""

    def take(
        self,
        call: CallT,
        message: Message,
        seconds_left: float | None,
        timings: bool = False,
        room: Room | None = None,
    ) -> PendingRequest[CallT] | None:
        """Take one call's message; the next `flush` queues it. None: it was rejected, and its error was delivered;
        or it is large, `room` is given, and `resume` is called once it is decoded.
        """

    def refuse(self, call: CallT, error: RequestError) -> None:
        """Reject a call with `error` without decoding it, and count the rejection."""

    def refuse_all(self, calls: Sequence[CallT], error: RequestError) -> None:
        """The same for several calls."""

    def count_refused(self, calls: int, error: RequestError) -> None:
        """Count calls that the transport has rejected by itself."""

    def flush(self) -> None:
        """Queue the requests taken since `begin`."""

    def run_pending(self) -> bool:
        """Run the batches due on this thread. Returns whether to call again, after polling for new arrivals."""


@runtime_checkable
class KnowsOrigin(Protocol):
    """A reply sink that knows where calls came from: for the access log and traces, of the requests they sample."""

    def traceparents(self, requests: Sequence[PendingRequest[Any]]) -> Sequence[bytes]:
        """The W3C's trace context in the headers of each request's call, not checked; empty if there is none."""

    def origin(self, call: Any) -> Origin: ...


class ReplySink(Protocol[CallT_contra]):
    """The destination of responses: a transport. `deliver` never blocks; called from any thread, once per request."""

    def deliver(
        self,
        requests: Sequence[PendingRequest[CallT_contra]],
        answers: Sequence[Answer],
        timing: BatchTiming | None,
    ) -> None: ...
