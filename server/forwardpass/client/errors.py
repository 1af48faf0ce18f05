"""The errors of a client's calls: one class for each gRPC status. Imports no gRPC library.

    errors.RequestError
    └── CallError                 a call failed; also raised itself, for the statuses that have no class below
        ├── Cancelled             CANCELLED            the call was cancelled, or its client closed
        ├── InvalidArgument       INVALID_ARGUMENT     the request is invalid; if the client itself detects that, it
        │                                              raises this and sends nothing
        ├── DeadlineExceeded      DEADLINE_EXCEEDED    no answer in time, or rejected early as it would be late
        ├── NotFound              NOT_FOUND            no such model or version
        ├── AlreadyExists         ALREADY_EXISTS       the name is taken
        ├── PermissionDenied      PERMISSION_DENIED    the token's role does not allow it
        ├── Unauthenticated       UNAUTHENTICATED      no token, or a wrong one
        ├── ResourceExhausted     RESOURCE_EXHAUSTED   the server is full, or the message is too large
        ├── FailedPrecondition    FAILED_PRECONDITION  the model failed to load; the text has the reason
        ├── Unimplemented         UNIMPLEMENTED        not offered by this server
        ├── Internal              INTERNAL             the server failed, or its response cannot be read
        └── Unavailable           UNAVAILABLE          not reachable, stopping, or still loading; try again

The server's own errors, which arrive as these, are in `forwardpass.errors`. A name in both modules is one error: the
class here is a subclass of the one there, so that `except errors.DeadlineExceeded` catches it wherever it was raised.
"""

from __future__ import annotations

from collections.abc import Iterable

from forwardpass import errors
from forwardpass.errors import RequestError, Status
from forwardpass.protocol.status import read_retry_after


class CallError(RequestError):
    """A call failed. `status` is its gRPC code, `details` the text that came with it (one line).

    `retry_after`: seconds to wait before a retry, as sent by the server; None if it sent none. A server does not send
    its `reason`.
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
    """The error for a status from `address`: a gRPC code, its text, and the trailing metadata."""
    status = Status(code)
    if status is Status.UNAVAILABLE:
        details = f"{address}: {details}"
    elif status is Status.DEADLINE_EXCEEDED and details == "Deadline Exceeded" and timeout is not None:
        # gRPC's own text if the deadline passed on the client's side.
        details = f"no answer from {address} within {timeout:g} s"
    return _BY_STATUS.get(status, CallError)(details, status=status, retry_after=read_retry_after(trailing))
