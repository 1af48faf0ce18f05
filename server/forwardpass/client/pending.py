"""The requests of one stream that have no answer yet: matched with what comes by id, each settled once. No I/O.

What is common to the streams of threads (`sync_stream`) and of tasks (`async_stream`).
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
from forwardpass.client.operations import Calls
from forwardpass.client.results import ModelInfo, parse
from forwardpass.protocol.status import read_parameters

STREAM_PATH: Final = protocol.METHODS["ModelStreamInfer"].path
STREAM_CLOSED: Final = "the stream is closed"


class Asked(NamedTuple):
    """A request that has no answer yet. `future` is a concurrent or an asyncio one."""

    future: Any
    info: ModelInfo
    model: str
    version: str
    id: str  # the caller's own


class Unanswered:
    """The requests of one stream that have no answer yet, by the ids that they have on the wire.

    Each is settled exactly once: by `hear`, or by `end`, after which there are none and come none.
    """

    def __init__(self, calls: Calls, address: str) -> None:
        self._calls = calls
        self._address = address
        self._asked: dict[str, Asked] = {}
        self._ids = itertools.count()
        self.ended: CallError | None = None  # why there will be no more answers

    def new_id(self) -> str:
        return str(next(self._ids))

    def add(self, wire_id: str, asked: Asked) -> None:
        """Raises what ended the stream, if something did."""
        if self.ended is not None:
            raise copy.copy(self.ended)  # of its own: a raised error carries the trace of who raised it
        self._asked[wire_id] = asked

    def hear(self, message: bytes) -> bool:
        """Settle the request that a ModelStreamInferResponse answers. False: it answers none, and that is no harm.

        Raises what ends the stream: an error that is no request's own, bytes that are no such message.
        """
        said = parse(protocol.ModelStreamInferResponse, message)
        response = said.infer_response
        error = self._error(said.error_message, response.parameters) if said.error_message else None
        asked = self._asked.pop(response.id, None)
        if asked is None:
            if error is not None:
                raise error
            return False
        with contextlib.suppress(InvalidStateError, asyncio.InvalidStateError):  # its caller cancelled it
            if error is None:
                try:
                    answer = self._calls.heard(response, asked.info, asked.model, asked.version, asked.id)
                except CallError as unreadable:
                    error = unreadable
                else:
                    asked.future.set_result(answer)
                    return True
            self._calls.refused(error, asked.model, asked.version)
            asked.future.set_exception(error)
        return True

    def end(self, error: CallError) -> int:
        """There will be no more answers. How many requests have none."""
        if self.ended is None:
            self.ended = error
        left = list(self._asked.values())
        self._asked.clear()
        for asked in left:
            with contextlib.suppress(InvalidStateError, asyncio.InvalidStateError):
                asked.future.set_exception(copy.copy(error))
                asked.future.exception()  # seen: asyncio complains of errors that nobody asked for
        return len(left)

    def over(self) -> CallError:
        """What it means that the server ended the stream without an error."""
        if self._asked:
            return Internal(f"the server ended the stream and left {len(self._asked)} requests unanswered")
        return Cancelled(STREAM_CLOSED)

    def _error(self, text: str, parameters: Any) -> CallError:
        status, retry_after = read_parameters(parameters)
        error = from_status(status, text, (), address=self._address, timeout=None)
        error.retry_after = retry_after
        return error
