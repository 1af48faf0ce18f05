"""A RequestError as gRPC sees it: code, one-line text, trailing metadata. The one place where errors become status."""

from __future__ import annotations

import math

from forwardpass.errors import RequestError, printable
from forwardpass.serving import protocol

DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"  # what gRPC's own retry policy obeys
# An error within a stream is, of the protocol, a text alone. For those who know them, its status and when to come back
# (seconds) stand beside it, as parameters of the empty response that comes with it.
STATUS_KEY = "forwardpass_status"
RETRY_KEY = "forwardpass_retry_after"
TEXT_LIMIT = 1024  # characters of a status text: it travels as a header

Trailers = list[tuple[str, str | bytes]]


def text_of(error: RequestError) -> str:
    """What its client is told, on one line."""
    return printable(str(error), TEXT_LIMIT)


def status_of(error: RequestError) -> tuple[int, str, Trailers | None]:
    """Code, text and trailing metadata. Where the error says when to retry, google.rpc.RetryInfo goes along, and,
    for the retry policy that a client's service config may have, the same in whole milliseconds."""
    text = text_of(error)
    if error.retry_after is None:
        return int(error.status), text, None
    info = protocol.RetryInfo()
    info.retry_delay.FromMicroseconds(round(error.retry_after * 1e6))
    status = protocol.RpcStatus(code=int(error.status), message=text)
    status.details.add().Pack(info)
    return (
        int(error.status),
        text,
        [
            (DETAILS_KEY, status.SerializeToString()),
            (PUSHBACK_KEY, str(max(1, math.ceil(error.retry_after * 1e3)))),
        ],
    )
