"""Every error of the project, on one page.

    ForwardpassError
    ├── RequestError                 one request was rejected or failed; carries its gRPC status and its reason
    │   ├── InvalidRequest           INVALID_ARGUMENT     the request cannot be right; sending it again will not help
    │   ├── UnknownModel             NOT_FOUND            no such model or version
    │   ├── UnknownRegion            NOT_FOUND            no shared-memory region is registered under this name
    │   ├── AlreadyExists            ALREADY_EXISTS       the name is taken
    │   ├── UnknownMethod            UNIMPLEMENTED        not offered here
    │   ├── ModelLoading             UNAVAILABLE          not ready yet; try again
    │   ├── ModelUnusable            FAILED_PRECONDITION  it failed to load; the text has the reason
    │   ├── RepositoryUnreadable     UNAVAILABLE          its folder cannot be read for now; try again
    │   ├── ControlRefused           FAILED_PRECONDITION  model control by request is not turned on
    │   ├── Overloaded               RESOURCE_EXHAUSTED   a bound on rows, requests or bytes is reached
    │   ├── TooLarge                 RESOURCE_EXHAUSTED   the message, or what it asks for, exceeds a limit
    │   ├── DeadlineExceeded         DEADLINE_EXCEEDED    expired, or could not have been met
    │   ├── Cancelled                CANCELLED            the client is gone
    │   ├── Draining                 UNAVAILABLE          the server is stopping; try another
    │   ├── Unauthenticated          UNAUTHENTICATED      no token, or a wrong one
    │   ├── PermissionDenied         PERMISSION_DENIED    the token's role does not allow it
    │   ├── RunFailed                INTERNAL             the network could not be run on these rows
    │   │   └── DeviceLost           INTERNAL             a GPU failed for good: the server exits, to be restarted
    │   └── CallError                any                  a call failed, as its client sees it; the tree below it is in
    │                                                     `client.errors`; same-named classes there subclass these
    ├── ModelError                   a model could not be loaded (repository, contract, configuration, provider)
    │   ├── ConfigError              its options are wrong: names the field and the file
    │   ├── ContractError            its outputs are not what its contract promises, or its files were changed
    │   └── Stopping                 the server is stopping: the load was given up
    ├── SettingsError                the server's own settings cannot be used
    ├── ExportError                  an export was refused; nothing was written
    ├── InsightError                 a model could not be inspected: no such model, data that do not fit it
    └── LoadTestError                a load test could not be run: no server answers, options that contradict each other

Which step raises what: `tokens` Unauthenticated, PermissionDenied; `decoder` and `parameters` InvalidRequest, TooLarge;
`shared_memory` UnknownRegion, AlreadyExists; `admission` Overloaded, Draining; `rejections` DeadlineExceeded; sessions
RunFailed, TooLarge (out of memory), DeviceLost; `repository` UnknownModel, ModelLoading, ModelUnusable; clients
Cancelled. Transports turn a RequestError into a gRPC status in one place: `status_of`.
"""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """gRPC's status codes, by number, so that no module needs grpcio to name one."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Reason(enum.StrEnum):
    """Why a request was rejected or failed: the label `reason` of forwardpass_refused_total, whose HELP lists these."""

    INVALID = "invalid"
    TOO_LARGE = "too_large"
    UNKNOWN_MODEL = "unknown_model"
    NOT_LOADED = "not_loaded"  # it is on disk, but its load was not requested
    LOADING = "loading"
    UNLOADING = "unloading"  # another version, or nothing, takes its place
    UNUSABLE = "unusable"
    MODEL_MEMORY = "model_memory"  # it does not fit beside the loaded models
    LOAD_WAITING = "load_waiting"  # too many calls wait for loads
    QUEUE_ROWS = "queue_rows"
    QUEUE_REQUESTS = "queue_requests"
    QUEUE_BYTES = "queue_bytes"
    QUEUE_TIMEOUT = "queue_timeout"
    SERVER_REQUESTS = "server_requests"
    SERVER_BYTES = "server_bytes"
    UNREAD = "unread"  # it waited for too long before the transport could look at it
    DEADLINE_UNREAD = "deadline_unread"  # before the transport could look at it
    DEADLINE_REFUSED = "deadline_refused"  # on arrival
    DEADLINE_EXPIRED = "deadline_expired"  # while it waited
    DEADLINE_HOPELESS = "deadline_hopeless"  # while it waited: not yet expired, but it cannot be met
    DEADLINE_LATE = "deadline_late"  # while it ran
    RUN_TIMEOUT = "run_timeout"
    RUN_FAILED = "run_failed"
    OUT_OF_MEMORY = "out_of_memory"
    DEVICE_LOST = "device_lost"
    DRAINING = "draining"
    CANCELLED = "cancelled"
    UNAUTHENTICATED = "unauthenticated"
    PERMISSION = "permission"
    UNKNOWN_REGION = "unknown_region"
    ALREADY_EXISTS = "already_exists"
    UNKNOWN_METHOD = "unknown_method"
    MODEL_CONTROL = "model_control"
    REPOSITORY = "repository"  # its folder could not be listed
    ERROR = "error"  # none of these


class ForwardpassError(Exception):
    """The root of every error this package raises on purpose."""


class RequestError(ForwardpassError):
    """One request was rejected or failed. `status` is its gRPC code, `reason` its label in the metrics."""

    status = Status.INTERNAL
    reason = Reason.ERROR
    retry_after: float | None = None  # seconds; sent as google.rpc.RetryInfo if set
    model: tuple[str, str] | None = None  # name and version, where the request is for one that is not served

    def __init__(self, text: str, *, reason: Reason | None = None, retry_after: float | None = None) -> None:
        super().__init__(text)
        if reason is not None:
            self.reason = reason
        if retry_after is not None:
            self.retry_after = retry_after


class InvalidRequest(RequestError):
    status, reason = Status.INVALID_ARGUMENT, Reason.INVALID


class UnknownModel(RequestError):
    status, reason = Status.NOT_FOUND, Reason.UNKNOWN_MODEL


class UnknownRegion(RequestError):
    status, reason = Status.NOT_FOUND, Reason.UNKNOWN_REGION


class AlreadyExists(RequestError):
    status, reason = Status.ALREADY_EXISTS, Reason.ALREADY_EXISTS


class UnknownMethod(RequestError):
    status, reason = Status.UNIMPLEMENTED, Reason.UNKNOWN_METHOD


class ModelLoading(RequestError):
    status, reason = Status.UNAVAILABLE, Reason.LOADING


class ModelUnusable(RequestError):
    status, reason = Status.FAILED_PRECONDITION, Reason.UNUSABLE


class RepositoryUnreadable(RequestError):
    """The repository's folder could not be listed. Models that are served stay."""

    status, reason = Status.UNAVAILABLE, Reason.REPOSITORY


class ControlRefused(RequestError):
    status, reason = Status.FAILED_PRECONDITION, Reason.MODEL_CONTROL


class Overloaded(RequestError):
    status = Status.RESOURCE_EXHAUSTED


class TooLarge(RequestError):
    status, reason = Status.RESOURCE_EXHAUSTED, Reason.TOO_LARGE


class DeadlineExceeded(RequestError):
    status = Status.DEADLINE_EXCEEDED


class Cancelled(RequestError):
    status, reason = Status.CANCELLED, Reason.CANCELLED


class Unread(RequestError):
    """The transport could not look at the call in time."""

    status, reason = Status.UNAVAILABLE, Reason.UNREAD


class Draining(RequestError):
    status, reason = Status.UNAVAILABLE, Reason.DRAINING


class Unauthenticated(RequestError):
    status, reason = Status.UNAUTHENTICATED, Reason.UNAUTHENTICATED


class PermissionDenied(RequestError):
    status, reason = Status.PERMISSION_DENIED, Reason.PERMISSION


class RunFailed(RequestError):
    status, reason = Status.INTERNAL, Reason.RUN_FAILED


class DeviceLost(RunFailed):
    """A device failed so that nothing can run on it in this process any more."""

    reason = Reason.DEVICE_LOST


class ModelError(ForwardpassError):
    """A model could not be loaded."""


class ConfigError(ModelError):
    """A model's options are wrong. Names the file and the field."""


class ContractError(ModelError):
    """A model's files or outputs are not what its contract promises."""


class Stopping(ModelError):
    """The server is stopping before the model was loaded."""


class SettingsError(ForwardpassError):
    """The server's own settings cannot be used."""


class ExportError(ForwardpassError):
    """An export was refused; nothing was written."""


class InsightError(ForwardpassError):
    """A model could not be inspected; nothing was served from it."""


def printable(text: str, limit: int = 80) -> str:
    """Untrusted text, made safe for one line of an error or a log."""
    if len(text) <= limit and text.isprintable():
        return text
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:limit])
    return shown + ("…" if len(text) > limit else "")


class LoadTestError(ForwardpassError):
    """A load test could not be run; what was measured until then is not reported as a result."""
