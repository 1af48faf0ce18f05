"""A request as the queue sees it, the batch it ends up in, and the bounds of both: plain data, no behaviour."""

from __future__ import annotations

import enum
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from forwardpass.errors import RequestError

NEVER = math.inf  # a deadline that is none


class RequestState(enum.IntEnum):
    NEW = 0
    QUEUED = 1
    RUNNING = 2
    SETTLED = 3


# Plain integers on the hot path; the enum is for those who read them.
NEW, QUEUED, RUNNING, SETTLED = (int(s) for s in RequestState)


class Request:
    """What the queue knows of a request: how much it brings, and by when it must be run."""

    __slots__ = ("arrival", "buffers", "deadline", "nbytes", "order", "priority", "rows", "stack_key", "state")

    def __init__(
        self,
        stack_key: Hashable,
        buffers: Sequence[bytes | memoryview],
        rows: int,
        nbytes: int,
        arrival: float,
        deadline: float,
        priority: int,
    ) -> None:
        self.stack_key = stack_key  # only requests of equal stack_key share a matrix
        self.buffers = buffers  # one buffer per input of the model, in the model's order; dropped when it is cancelled
        self.rows = rows  # what it counts for in every bound: at least 1
        self.nbytes = nbytes  # of its message
        self.arrival = arrival  # seconds, on the server's monotonic clock
        self.deadline = deadline  # seconds, on the same clock; inf: none
        self.priority = priority  # 1 is the highest
        self.state = NEW
        self.order: tuple[int, float] = (priority, arrival)

    # How long it may wait for an instance, as a time on the server's clock. On the class, and a slot of those alone
    # that have a queue timeout: the others neither store nor set it.
    start_by: float = NEVER


RequestT = TypeVar("RequestT", bound=Request)


@dataclass(frozen=True, slots=True)
class QueueLimits:
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
class WorkerOptions:
    """What a worker was told, with every choice made."""

    limits: QueueLimits
    run_rows: int = 0  # rows of one run where requests do not share runs; 0: limits.max_batch_rows
    instances: int = 1
    row_independent: bool = True  # a request of more rows than a matrix may be run in slices
    max_request_rows: int = 65536
    priority_levels: int = 1
    default_priority: int = 1
    queue_timeouts: Mapping[int, QueueTimeout] | None = None  # of every priority; None: requests set their own
    inline_run_limit: float = 0.0  # seconds; 0: always hand over


class Settled(NamedTuple, Generic[RequestT]):
    """A request that will not run, and the error to send to its client."""

    request: RequestT
    error: RequestError


@dataclass(slots=True)
class Batch(Generic[RequestT]):
    """Requests of one stack key that run as one matrix, in the order of their rows."""

    requests: list[RequestT]
    rows: int
    taken: float  # seconds, when it left the queue
    dropped: list[Settled[RequestT]] = field(default_factory=list)
