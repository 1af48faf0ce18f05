"""Errors as gRPC carries them, written and read: code, one-line text, trailing metadata; in a stream, parameters.

The only place that converts errors to statuses. The client maps codes to its own error classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from google.protobuf.message import DecodeError

from forwardpass.errors import RequestError, Status, printable
from forwardpass.protocol.messages import RetryInfo, RpcStatus

DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"  # read by gRPC's own retry policy
# In the protocol, an error within a stream is only a text. Its status and the seconds to wait before a retry are added
# as parameters of the empty response that comes with it, for clients that read them.
_STATUS_KEY = "forwardpass_status"
_RETRY_KEY = "forwardpass_retry_after"
TEXT_LIMIT = 1024  # characters of a status text: it travels as a header

Trailers = list[tuple[str, str | bytes]]


def text_of(error: RequestError) -> str:
    """The error's text for the client, on one line."""
    return printable(str(error), TEXT_LIMIT)


def status_of(error: RequestError) -> tuple[int, str, Trailers | None]:
    """Code, text and trailing metadata. If the error has a time to retry after, it is sent as google.rpc.RetryInfo and,
    for a retry policy in the client's service config, in whole milliseconds."""
    text = text_of(error)
    if error.retry_after is None:
        return int(error.status), text, None
    info = RetryInfo()
    info.retry_delay.FromMicroseconds(round(error.retry_after * 1e6))
    status = RpcStatus(code=int(error.status), message=text)
    status.details.add().Pack(info)
    return (
        int(error.status),
        text,
        [
            (DETAILS_KEY, status.SerializeToString()),
            (PUSHBACK_KEY, str(max(1, math.ceil(error.retry_after * 1e3)))),
        ],
    )


def read_retry_after(trailing: Iterable[tuple[str, str | bytes]]) -> float | None:
    """The seconds to wait before a retry, from trailing metadata; None: not given."""
    for key, value in trailing:
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                for detail in RpcStatus.FromString(value).details:
                    info = RetryInfo()
                    if detail.Unpack(info):
                        return float(info.retry_delay.seconds + info.retry_delay.nanos * 1e-9)
            except DecodeError:
                return None
    return None


def write_parameters(error: RequestError, parameters: Any) -> None:
    """Write an error's status, and the seconds to retry after, to the `parameters` of a response on a stream."""
    parameters[_STATUS_KEY].int64_param = int(error.status)
    if error.retry_after is not None:
        parameters[_RETRY_KEY].double_param = error.retry_after


def read_parameters(parameters: Any) -> tuple[int, float | None]:
    """The status of an error on a stream (UNKNOWN if not sent), and the seconds to retry after, if any."""
    status = parameters[_STATUS_KEY].int64_param if _STATUS_KEY in parameters else Status.UNKNOWN
    return int(status), parameters[_RETRY_KEY].double_param if _RETRY_KEY in parameters else None
