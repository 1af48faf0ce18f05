"""Responses of the HTTP port: JSON, and errors with the status that belongs to each."""

from __future__ import annotations

import math
from typing import Any, Final

import orjson
from starlette.responses import Response

from forwardpass.errors import Reason, RequestError, Status
from forwardpass.protocol.status import text_of
from forwardpass.transport.interface import Metadata
from forwardpass.transport.rest.bodies import UnknownEncoding

JSON: Final = "application/json"
BINARY: Final = "application/octet-stream"

# google.rpc.Code's own mapping to HTTP.
_STATUS: Final = {
    Status.INVALID_ARGUMENT: 400, Status.OUT_OF_RANGE: 400, Status.FAILED_PRECONDITION: 400,
    Status.UNAUTHENTICATED: 401, Status.PERMISSION_DENIED: 403, Status.NOT_FOUND: 404, Status.ALREADY_EXISTS: 409,
    Status.ABORTED: 409, Status.RESOURCE_EXHAUSTED: 429, Status.CANCELLED: 499, Status.UNIMPLEMENTED: 501,
    Status.UNAVAILABLE: 503, Status.DEADLINE_EXCEEDED: 504,
}  # fmt: skip
# Where the reason says more than the gRPC status does.
_BY_REASON: Final = {Reason.TOO_LARGE: 413, Reason.OUT_OF_MEMORY: 413, Reason.UNUSABLE: 503}


def json_response(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type=JSON)


def headers_of(trailers: Metadata) -> dict[str, str]:
    """Trailing metadata as response headers."""
    return {key: value for key, value in trailers if isinstance(value, str)}


def error_response(error: RequestError) -> Response:
    """`{"error": text}` with the error's HTTP status, and the time to wait before a retry where it has one."""
    status = 415 if isinstance(error, UnknownEncoding) else _BY_REASON.get(error.reason, _STATUS.get(error.status, 500))
    response = json_response({"error": text_of(error)}, status)
    if status == 401:
        response.headers["www-authenticate"] = "Bearer"
    if status == 415:
        response.headers["accept-encoding"] = "gzip, deflate"
    if error.retry_after is not None:
        response.headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))  # HTTP has whole seconds
        response.headers["retry-after-ms"] = str(max(1, math.ceil(error.retry_after * 1e3)))
    return response
