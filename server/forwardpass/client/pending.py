"""The unanswered requests of one stream: matched with responses by id, each settled once. No I/O.

Shared by the streams of threads (`sync_stream`) and of tasks (`async_stream`).
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
from concurrent.futures import InvalidStateError
from typing import Any, Final, NamedTuple

from forwardpass import protocol
from forwardpass.client.errors import CallError, Cancelled, Internal, from_status
from forwardpass.client.operations import Operations
from forwardpass.client.results import ModelInfo, parse
from forwardpass.protocol.status import read_parameters

STREAM_PATH: Final = protocol.METHODS["ModelStreamInfer"].path
STREAM_CLOSED: Final = "the stream is closed"


class StreamedRequest(NamedTuple):
    """An unanswered request. `future` is a concurrent.futures or an asyncio one."""

    future: Any
    info: ModelInfo
    model: str
    version: str
    id: str  # the caller's own


class PendingRequests:
    """The unanswered requests of one stream, by their ids on the wire.

    Each is settled exactly once: by `on_response`, or by `end`, after which none are left and none can be added.
    """

    def __init__(self, operations: Operations, address: str) -> None:
        self._operations = operations
        self._address = address
        self._requests: dict[str, StreamedRequest] = {}
        self._ids = itertools.count()
        self.ended: CallError | None = None  # the error that ended the stream

    def new_id(self) -> str:
        return str(next(self._ids))

    def add(self, wire_id: str, request: StreamedRequest) -> None:
        """Add a request. Raises the error that ended the stream, if it has ended."""
        if self.ended is not None:
            raise copy.copy(self.ended)  # a copy: a raised error carries its raiser's traceback
        self._requests[wire_id] = request

    def on_response(self, message: bytes) -> bool:
        """Settle the request that a ModelStreamInferResponse answers. False: it answers none, which is harmless.

        Raises errors that end the stream: one that belongs to no request, or invalid bytes.
        """
        said = parse(protocol.ModelStreamInferResponse, message)
        response = said.infer_response
        error = self._error(said.error_message, response.parameters) if said.error_message else None
        request = self._requests.pop(response.id, None)
        if request is None:
            if error is not None:
                raise error
            return False
        with contextlib.suppress(InvalidStateError, asyncio.InvalidStateError):  # its caller cancelled it
            if error is None:
                try:
                    answer = self._operations.heard(response, request.info, request.model, request.version, request.id)
                except CallError as unreadable:
                    error = unreadable
                else:
                    request.future.set_result(answer)
                    return True
            self._operations.refused(error, request.model, request.version)
            request.future.set_exception(error)
        return True

    def end(self, error: CallError) -> int:
        """Fail all unanswered requests with `error`. Returns their number."""
        if self.ended is None:
            self.ended = error
        left = list(self._requests.values())
        self._requests.clear()
        for request in left:
            with contextlib.suppress(InvalidStateError, asyncio.InvalidStateError):
                request.future.set_exception(copy.copy(error))
                request.future.exception()  # mark it as retrieved: asyncio logs errors that are never retrieved
        return len(left)

    def over(self) -> CallError:
        """The error for a stream that the server ended without an error."""
        if self._requests:
            return Internal(f"the server ended the stream and left {len(self._requests)} requests unanswered")
        return Cancelled(STREAM_CLOSED)

    def _error(self, text: str, parameters: Any) -> CallError:
        status, retry_after = read_parameters(parameters)
        error = from_status(status, text, (), address=self._address, timeout=None)
        error.retry_after = retry_after
        return error
