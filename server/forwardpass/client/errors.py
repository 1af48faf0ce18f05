"""What a call can fail with, as its client sees it: one class for each gRPC status. No gRPC library here.

    errors.RequestError
    └── CallError                 a call failed; also raised itself, for the statuses that have no class below
        ├── Cancelled             CANCELLED            the call was cancelled, or its client closed
        ├── InvalidArgument       INVALID_ARGUMENT     the request cannot be right; raised by the client itself where
        │                                              it can tell, and then nothing was sent
        ├── DeadlineExceeded      DEADLINE_EXCEEDED    no answer in time, or the server saw that it could not be in time
        ├── NotFound              NOT_FOUND            no such model or version
        ├── AlreadyExists         ALREADY_EXISTS       the name is taken
        ├── PermissionDenied      PERMISSION_DENIED    the token's role does not allow it
        ├── Unauthenticated       UNAUTHENTICATED      no token, or a wrong one
        ├── ResourceExhausted     RESOURCE_EXHAUSTED   the server is full, or the message is too large
        ├── FailedPrecondition    FAILED_PRECONDITION  the model failed to load; the text says why
        ├── Unimplemented         UNIMPLEMENTED        not offered by this server
        ├── Internal              INTERNAL             the server failed, or its answer cannot be read
        └── Unavailable           UNAVAILABLE          nobody there, stopping, or still loading; try again

The server's own errors, which these are the far end of, are in `forwardpass.errors`. A name that stands in both is one
error: the class here is a subclass of the one there, so that `except errors.DeadlineExceeded` catches it wherever it
was raised.
"""

from __future__ import annotations

from collections.abc import Iterable

from forwardpass import errors
from forwardpass.errors import RequestError, Status
from forwardpass.protocol.status import read_retry_after


class CallError(RequestError):
    """A call failed. `status` is its gRPC code, `details` the text that came with it (one line).

    `retry_after` is the seconds that the server asked to wait before the request is sent again; None where it asked
    for nothing. A server does not send its `reason`.
    """

    status = Status.UNKNOWN

    def __init__(self, details: str, *, status: Status | None = None, retry_after: float | None = None) -> None:
        self.details = " ".join(details.split())
        super().__init__(self.details)
        self.retry_after = retry_after
        if status is not None:
            self.status = status

    def __str__(self) -> str:
        return f"{self.status.name}: {self.details}"


class Cancelled(CallError, errors.Cancelled):
    status = Status.CANCELLED


class InvalidArgument(CallError):
    status = Status.INVALID_ARGUMENT


class DeadlineExceeded(CallError, errors.DeadlineExceeded):
    status = Status.DEADLINE_EXCEEDED


class NotFound(CallError):
    status = Status.NOT_FOUND


class AlreadyExists(CallError, errors.AlreadyExists):
    status = Status.ALREADY_EXISTS


class PermissionDenied(CallError, errors.PermissionDenied):
    status = Status.PERMISSION_DENIED


class Unauthenticated(CallError, errors.Unauthenticated):
    status = Status.UNAUTHENTICATED


class ResourceExhausted(CallError):
    status = Status.RESOURCE_EXHAUSTED


class FailedPrecondition(CallError):
    status = Status.FAILED_PRECONDITION


class Unimplemented(CallError):
    status = Status.UNIMPLEMENTED


class Internal(CallError):
    status = Status.INTERNAL


class Unavailable(CallError):
    status = Status.UNAVAILABLE


_BY_STATUS = {cls.status: cls for cls in CallError.__subclasses__()}


def from_status(
    code: int, details: str, trailing: Iterable[tuple[str, str | bytes]], *, address: str, timeout: float | None
) -> CallError:
    """The error for what came back from `address`: a gRPC code, its text, and the trailing metadata."""
    status = Status(code)
    if status is Status.UNAVAILABLE:
        details = f"{address}: {details}"
    elif status is Status.DEADLINE_EXCEEDED and details == "Deadline Exceeded" and timeout is not None:
        # gRPC's own text, when it is this end that gave up.
        details = f"no answer from {address} within {timeout:g} s"
    return _BY_STATUS.get(status, CallError)(details, status=status, retry_after=read_retry_after(trailing))
