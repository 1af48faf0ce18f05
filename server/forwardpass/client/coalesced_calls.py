"""`predict` for callers that share requests, without a channel: a caller's group, the request for a group, and each
caller's part of the outputs. `coalescing_threads` and `coalescing_tasks` send the requests; `coalescer` decides when.

A request whose error may be due to one caller's rows is sent again in halves, until that caller is alone.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from forwardpass.client.coalescer import CLOSED, Bell, Coalesce, Coalescer, Group, GroupKey, Rows, may_share
from forwardpass.client.errors import (
    CallError,
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
)
from forwardpass.client.operations import Operations, Steps, remember
from forwardpass.errors import Status

logger = logging.getLogger(__name__)


# The key of calls of one kind: model, version, output, priority, timeout, and the array's shape and dtype.
Like = tuple[str, str, str | None, int, float | None, tuple[int, ...], np.dtype[Any]]


class Way(NamedTuple):
    """How to make calls of one kind. `group` None: each alone, valid until model metadata are forgotten."""

    group: Group | None
    rows: int  # rows of the array
    one_row: bool  # the array has no batch axis
    limit: float  # seconds; inf: none
    forgotten: int


class CoalescedCalls:
    """`predict` for callers that share requests. `bell` makes the Bells that they wait for."""

    def __init__(self, operations: Operations, options: Coalesce, address: str, bell: Callable[[], Bell]) -> None:
        self.operations = operations
        self.coalescer = Coalescer(options, time.monotonic, bell)
        self._address = address
        self.ways: dict[Like, Way] = {}

    def known(self, like: Like) -> Way | None:
        """The Way of calls with the key `like`: equal arguments, an array of equal shape and dtype. None if unknown."""
        way = self.ways.get(like)
        if way is None or (way.group.shares if way.group is not None else way.forgotten == self.operations.forgotten):
            return way
        return None

    def way(self, like: Like, array: NDArray[Any]) -> Steps[Way]:
        """Make and remember the Way of calls with a new key. Requests the model's metadata if they are not known."""
        model, version, output, priority, timeout, *_ = like
        limit = self.operations.limit(timeout)
        info = yield from self.operations.known(model, version, limit)
        options = self.coalescer.options
        one_row = len(info.inputs) == 1 and array.ndim == len(info.inputs[0].shape) - 1
        count = 1 if one_row else len(array) if array.ndim else 0
        tail = array.shape if one_row else array.shape[1:]
        large = 2 * count > options.max_rows or 2 * array.nbytes > options.max_bytes
        group = None
        if array.size and not large and may_share(info, len(tail)):
            # The power of two above the time limit, so that only callers of similar urgency share requests.
            urgency = None if limit is None else math.frexp(limit)[1]
            group = self.coalescer.group(GroupKey(model, version, output, priority, tail, array.dtype, urgency))
        way = Way(group, count, one_row, math.inf if limit is None else limit, self.operations.forgotten)
        remember(self.ways, like, way)
        return way

    def share(self, group: Group, batch: Sequence[Rows]) -> Steps[None]:
        """Settle every caller in `batch` with its outputs or its error, by one request if possible."""
        coalescer = self.coalescer
        parts = [batch]
        while parts:
            part = [rows for rows in parts.pop() if not rows.gone]
            if not part:
                continue
            try:
                answer = yield from self._together(group, part)
            except CallError as error:
                if len(part) > 1 and _may_be_of_one(error):
                    parts += reversed(coalescer.apart(part, (len(part) + 1) // 2))
                else:
                    coalescer.fail(part, error)
                continue
            if answer is not None:
                coalescer.settle(part, answer)
            else:
                coalescer.drop(group)
                parts += reversed(coalescer.apart(part, 1))

    def _together(self, group: Group, part: Sequence[Rows]) -> Steps[NDArray[Any] | None]:
        """Send all rows in one request and return the outputs [B, ...]. None: rows may affect each other's outputs."""
        key = group.key
        rows = _stacked(key, part)
        answer = yield from self.operations.infer(
            key.model,
            rows,
            version=key.version,
            outputs=None if key.output is None else (key.output,),
            # The latest deadline counts; the other callers leave at their own.
            timeout=max([rows.deadline for rows in part]) - time.monotonic(),
            priority=key.priority,
        )
        if answer.version != group.version and len(part) > 1:
            # Another version than before: check that its rows may share a request.
            info = yield from self.operations.metadata(key.model, version=key.version, timeout=None)
            if not may_share(info, len(key.tail)):
                return None
            group.version = answer.version
        result = answer.only()
        if result.shape[:1] != rows.shape[:1]:
            raise Internal(f"the answer to {len(rows)} rows is of shape {list(result.shape)}")
        return result

    def result(self, way: Way, rows: Rows) -> NDArray[Any]:
        """A caller's own outputs. Raises its error, or DeadlineExceeded if there is no outcome."""
        outcome = rows.outcome
        if isinstance(outcome, CallError):
            raise copy.copy(outcome)  # a copy: a raised error carries its raiser's traceback
        if outcome is None:
            raise DeadlineExceeded(f"no answer from {self._address} within {way.limit:.3g} s")
        if way.one_row and outcome.ndim > 1:
            row: NDArray[Any] = outcome[rows.place].copy()
            return row
        result = outcome[rows.place : rows.place + rows.count].copy()
        return result.reshape(result.shape[1:]) if way.one_row else result


def _stacked(key: GroupKey, batch: Sequence[Rows]) -> NDArray[Any]:
    """The rows of all callers, in order: [B, ...]."""
    count = sum([rows.count for rows in batch])
    if key.dtype.hasobject:
        return np.concatenate([rows.data.reshape(rows.count, *key.tail) for rows in batch])
    return np.frombuffer(b"".join([rows.data for rows in batch]), key.dtype).reshape(count, *key.tail)


def _may_be_of_one(error: CallError) -> bool:
    """Whether an error may be due to one caller's rows, so that the others may succeed without them."""
    if isinstance(error, ResourceExhausted):
        return error.retry_after is None  # the message is too large; a full server sends a time to retry after
    return isinstance(error, InvalidArgument | Internal) or error.status in (Status.UNKNOWN, Status.OUT_OF_RANGE)


def unsettled(error: BaseException) -> CallError:
    """The error for callers whose shared request failed with an unexpected exception."""
    if not isinstance(error, Exception) or (isinstance(error, ValueError) and str(error) == CLOSED):
        return Cancelled("the client was closed")
    logger.error("a shared request failed", exc_info=error)
    return Internal(f"a shared request failed: {type(error).__name__}")
