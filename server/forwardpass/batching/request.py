"""A request as the queue sees it, its batch, and the bounds of both: plain data, no behaviour."""

from __future__ import annotations

import enum
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from forwardpass.errors import RequestError

NEVER = math.inf  # stands for no deadline


class RequestState(enum.IntEnum):
    NEW = 0
    QUEUED = 1
    RUNNING = 2
    SETTLED = 3


# Plain integers on the hot path; the enum names them for readers.
NEW, QUEUED, RUNNING, SETTLED = (int(s) for s in RequestState)


class Closed:
    """Why no more requests joined a batch. Plain integers, for the hot path."""

    FULL = 0  # no further request would have fit
    PREFERRED = 1  # it has a preferred size
    DELAY = 2  # its oldest request had waited for the queue delay
    DEADLINE = 3  # one request more, or waiting longer, would have missed a deadline
    QUEUE_TIMEOUT = 4  # waiting longer would have ended a request's queue timeout
    IDLE = 5  # an instance was free and took what there was
    ALONE = 6  # a single request that skipped the queue, run by the thread that received it
    ENDING = 7  # the model is being unloaded: nothing is waited for

    NAMES = ("full", "preferred", "delay", "deadline", "queue_timeout", "idle", "alone", "ending")  # by number


class Request:
    """The queue's view of a request: its size, and by when it must run."""

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
        self.buffers = buffers  # one buffer per model input, in the model's order; dropped on cancellation
        self.rows = rows  # its weight in every bound: at least 1
        self.nbytes = nbytes  # of its message
        self.arrival = arrival  # seconds, on the server's monotonic clock
        self.deadline = deadline  # seconds, on the same clock; inf: none
        self.priority = priority  # 1 is the highest
        self.state = NEW
        self.order: tuple[int, float] = (priority, arrival)

    @property
    def client(self) -> Hashable:
        """Whose it is; used only of requests with more rows than a batch."""
        return None

    # The end of its queue timeout, as a time on the server's clock. A class attribute, and a slot only of the subclass
    # for requests with a queue timeout: the others neither store nor set it.
    start_by: float = NEVER


RequestT = TypeVar("RequestT", bound=Request)


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of one queue. `rows`, `requests` and `nbytes` bound the total that may wait."""

    max_batch_rows: int = 64
    rows: int = 8192  # except of large requests
    large_rows: int = 131072  # of requests that run in several turns: of them, rows that have not run
    requests: int = 4096
    nbytes: int = 256 << 20
    delay: float = 0.0  # seconds a batch that is not full may wait for more rows
    preferred: tuple[int, ...] = ()  # preferred batch sizes in rows; a delayed batch closes when it reaches one
    by_priority: Mapping[int, int] = field(default_factory=dict)  # most waiting requests of a priority
    deadlines: bool = True  # near deadlines first and early rejection; off: first come, first served


class QueueTimeout(NamedTuple):
    """The queue timeout of one priority, in seconds, and whether a request may ask for a shorter one."""

    seconds: float = NEVER
    may_shorten: bool = True

    def of(self, asked: float) -> float:
        """The timeout of a request that asks for `asked` seconds; inf: none."""
        return asked if self.may_shorten and asked < self.seconds else self.seconds


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """A worker's options, fully resolved."""

    limits: QueueLimits
    run_rows: int = 0  # rows per run where requests do not share runs; 0: limits.max_batch_rows
    instances: int = 1
    row_independent: bool = True  # a request with more rows than a matrix may be run in slices
    max_request_rows: int = 65536
    priority_levels: int = 1
    default_priority: int = 1
    queue_timeouts: Mapping[int, QueueTimeout] | None = None  # of every priority; None: requests set their own
    inline_run_limit: float = 0.0  # seconds; 0: always hand over to a worker thread
    shrink_arena: bool = False  # give unused memory back after every run


class Settled(NamedTuple, Generic[RequestT]):
    """A request that will not run, and the error to send to its client."""

    request: RequestT
    error: RequestError


class LargeTurn(NamedTuple, Generic[RequestT]):
    """Rows of a request that run by themselves, while others wait: see `large_requests`."""

    request: RequestT
    client: Hashable
    start: int
    stop: int
    running: int = 0  # turns of the request that run, this one included

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(slots=True)
class Batch(Generic[RequestT]):
    """Requests of one stack key that run as one matrix, in the order of their rows."""

    requests: list[RequestT]
    rows: int
    nbytes: int  # of its requests' messages
    taken: float  # seconds, when it left the queue
    closed: int  # one of Closed
    dated: bool  # whether any of its requests may have a deadline
    dropped: list[Settled[RequestT]] = field(default_factory=list)
    turn: LargeTurn[RequestT] | None = None  # of its only request, which has more rows than the batch
