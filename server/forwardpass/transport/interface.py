"""What a transport and those above it know of each other: calls, handlers of methods, and where ModelInfer goes.

A transport knows no model and no batch. It hands each call of ModelInfer to a RequestSink, whose answers come back by
the transport's `deliver`; a call of any other method goes to the Handler of its path, on the event loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

from forwardpass.errors import RequestError
from forwardpass.protocol.timings import BatchTiming

Metadata = Sequence[tuple[str, str | bytes]]  # of a call: keys in lower case, bytes for those that end in -bin
Authorize = Callable[[Metadata], RequestError | None]  # why a call with this metadata may not be made; None: it may
Answer = bytes | RequestError  # a response's message, or why there is none

CallT = TypeVar("CallT")
CallT_co = TypeVar("CallT_co", covariant=True)
CallT_contra = TypeVar("CallT_contra", contravariant=True)


class CallContext(Protocol):
    """One call, as the handler of its method sees it. Lives on the event loop."""

    @property
    def metadata(self) -> Metadata:
        """What the client sent with its headers."""

    @property
    def seconds_left(self) -> float | None:
        """Until the call's deadline, at least 0; None: it has none."""

    async def read(self) -> bytes | None:
        """The client's next message; None once it has sent all."""

    async def write(self, message: bytes) -> None:
        """Send a message. Returns when the client has room for the next one."""

    def set_trailers(self, trailers: Metadata) -> None:
        """Metadata to send with the status, where the call succeeds."""


class Handler(NamedTuple):
    """A method. `function` returns the one message of the response, or None if the method `streams`.

    It ends a call with a status by raising RequestError; anything else it raises is INTERNAL, and logged.
    """

    function: Callable[[CallContext], Awaitable[bytes | None]]
    streams: bool


Handlers = Mapping[str, Mapping[str, Handler]]  # by service and method


class PendingRequest(Protocol[CallT_co]):
    """A request that was queued for a call, until it is answered."""

    @property
    def call(self) -> CallT_co: ...
    @property
    def arrival(self) -> float:
        """Seconds, on the monotonic clock."""

    @property
    def timings(self) -> bool:
        """Whether its response is to carry what its batch took."""

    def cancel(self) -> None:
        """The client does not wait for it any more."""


class RequestSink(Protocol[CallT]):
    """Where calls of ModelInfer go. For one thread.

    Collect what has arrived between `begin` and `flush`, then `run_pending` until it returns False.
    """

    now: float  # when the group of calls that was begun last arrived, on the monotonic clock
    saturated: bool  # whether all that was flushed last waits for models that are saturated
    before_run: Callable[[float], None] | None  # called with the predicted seconds of a run that follows another

    @property
    def slack(self) -> float:
        """Estimated seconds in which a new request of the models that were saturated last can't start."""

    @property
    def mixed(self) -> bool:
        """Whether calls came for some models while others were saturated."""

    @property
    def full(self) -> bool:
        """Whether a full batch waits for this thread."""

    def begin(self) -> None:
        """A group of calls has arrived: they share one time of arrival."""

    def take(
        self, call: CallT, message: bytes, seconds_left: float | None, timings: bool = False
    ) -> PendingRequest[CallT] | None:
        """Queue one call's message with the next `flush`. None: it was rejected, and has been answered."""

    def refuse(self, call: CallT, error: RequestError) -> None:
        """Answer a call with an error without decoding it, and count that."""

    def flush(self) -> None:
        """Queue what was taken since `begin`."""

    def run_pending(self) -> bool:
        """Run what is this thread's to run. Returns whether to call again, after a look for new arrivals."""


class ReplySink(Protocol[CallT_contra]):
    """Where answers go: the transport. `deliver` is called from any thread, once per request, and does not block."""

    def deliver(
        self,
        requests: Sequence[PendingRequest[CallT_contra]],
        answers: Sequence[Answer],
        timing: BatchTiming | None,
    ) -> None: ...
