"""A request on its way through the server, the batch it ends up in, and what holds for both: plain data, no behaviour.

The request carries its own reply slot and timestamps, so that there is no table of requests beside the queue to keep in
step with it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from forwardpass.errors import RequestError
from forwardpass.protocol.timings import write_timings

NEVER = math.inf  # a deadline that is none


class State(enum.IntEnum):
    NEW = 0
    QUEUED = 1
    RUNNING = 2
    SETTLED = 3


# Plain integers on the hot path; the enum is for those who read them.
NEW, QUEUED, RUNNING, SETTLED = (int(s) for s in State)


class Request:
    """One call's rows on their way through the server, with its reply slot (`door`, `call`) and its timestamps."""

    __slots__ = (
        "arrival", "buffers", "call", "deadline", "door", "header", "id_field", "nbytes", "order", "priority",
        "rows", "signature", "state", "timings",
    )  # fmt: skip

    def __init__(
        self,
        header: Any,
        buffers: Any,
        signature: Any,
        rows: int,
        nbytes: int,
        arrival: float,
        deadline: float,
        priority: int,
        door: Any,
        call: Any,
        timings: bool = False,
        id_field: bytes = b"",
    ) -> None:
        self.header = header  # what its message says beside tensors and id (request_template.RequestTemplate)
        self.buffers = buffers  # one buffer per input of the model, in the model's order
        self.signature = signature  # only requests of equal signature share a matrix
        self.rows = rows  # what it counts for in every bound: at least 1
        self.nbytes = nbytes  # of its message
        self.arrival = arrival  # seconds, on the server's monotonic clock
        self.deadline = deadline  # seconds, on the same clock; inf: none
        self.priority = priority  # 1 is the highest
        self.door = door
        self.call = call
        self.timings = timings
        self.id_field = id_field  # its id as a field of a message, tag and length included; empty: it has none
        self.state = NEW
        self.order: tuple[int, float] = (priority, arrival)

    # How long it may wait for an instance, as a time on the server's clock. On the class, and a slot of TimedRequest
    # alone: requests without a queue timeout neither store nor set it.
    start_by: float = NEVER


class TimedRequest(Request):
    """A request with a queue timeout: rejected if no instance was free by `start_by`, however long its run takes."""

    __slots__ = ("start_by",)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one queue. `rows`, `requests` and `nbytes` are what may wait, all together."""

    max_batch_rows: int = 64
    rows: int = 8192
    requests: int = 4096
    nbytes: int = 256 << 20
    delay: float = 0.0  # seconds a batch that is not full may wait for more rows
    preferred: tuple[int, ...] = ()  # row counts to make batches of, and at which a delayed one stops waiting
    by_priority: Mapping[int, int] = field(default_factory=dict)  # requests that may wait of a priority
    deadlines: bool = True  # earliest deadline first and early refusal; off: first come, first served


class QueueTimeout(NamedTuple):
    """How long a request of one priority may wait for an instance, in seconds, and whether it may ask for less."""

    seconds: float = NEVER
    may_shorten: bool = True

    def of(self, asked: float) -> float:
        """The timeout of a request that asks for `asked` seconds; inf: none."""
        return asked if self.may_shorten and asked < self.seconds else self.seconds


@dataclass(frozen=True, slots=True)
class Options:
    """What a worker was told, with every choice made."""

    limits: Limits
    run_rows: int = 0  # rows of one run where requests do not share runs; 0: limits.max_batch_rows
    instances: int = 1
    row_independent: bool = True  # a request of more rows than a matrix may be run in slices
    max_request_rows: int = 65536
    priority_levels: int = 1
    default_priority: int = 1
    queue_timeouts: Mapping[int, QueueTimeout] | None = None  # of every priority; None: requests set their own
    inline_run_limit: float = 0.0  # seconds; 0: always hand over


class Settled(NamedTuple):
    """A request that will not run, and what to tell its client."""

    request: Request
    error: RequestError


@dataclass(slots=True)
class Batch:
    """Requests of one signature that run as one matrix, in the order of their rows."""

    requests: list[Request]
    rows: int
    taken: float  # seconds, when it left the queue
    dropped: list[Settled] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one batch, in seconds on the server's clock; sent to the requests that asked for it."""

    taken: float
    run: float
    done: float
    rows: int

    def trailers(self, arrival: float) -> list[tuple[str, str]]:
        """As trailing metadata, in whole microseconds."""
        return write_timings(self.taken - arrival, self.run, self.done - arrival, self.rows)
