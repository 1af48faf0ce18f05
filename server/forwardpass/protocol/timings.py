"""The timings of a request in the trailing metadata of its response, written and read. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

TIMINGS_KEY: Final = "forwardpass-timings"  # request metadata that asks for timings in the trailing metadata
_PREFIX = "forwardpass-"
_QUEUE, _RUN, _TOTAL = "forwardpass-queue-us", "forwardpass-run-us", "forwardpass-total-us"
_ROWS = "forwardpass-batch-rows"


@dataclass(frozen=True, slots=True)
class Timings:
    """The server's time for a request, in microseconds, and the rows of the matrix that it was part of.

    None if the server did not send the value.
    """

    queue_us: float | None
    run_us: float | None
    total_us: float | None
    batch_rows: int | None


@dataclass(frozen=True, slots=True)
class BatchTiming:
    """The timings of one batch, in seconds on the server's monotonic clock; sent to requests that asked for them."""

    taken: float  # when it left the queue
    run: float  # seconds in the network
    done: float  # when its responses were ready
    rows: int

    def trailers(self, arrival: float) -> list[tuple[str, str]]:
        """The trailing metadata of a request that arrived at `arrival`, in whole microseconds."""
        return write_timings(self.taken - arrival, self.run, self.done - arrival, self.rows)


def write_timings(queue: float, run: float, total: float, rows: int) -> list[tuple[str, str]]:
    """Timings as trailing metadata, in whole microseconds. The arguments are in seconds."""
    return [
        (_QUEUE, str(round(queue * 1e6))),
        (_RUN, str(round(run * 1e6))),
        (_TOTAL, str(round(total * 1e6))),
        (_ROWS, str(rows)),
    ]


def read_timings(trailing: Iterable[tuple[str, str | bytes]]) -> Timings:
    """The timings in a response's trailing metadata."""
    values = {key: float(value) for key, value in trailing if key.startswith(_PREFIX)}
    rows = values.get(_ROWS)
    return Timings(
        queue_us=values.get(_QUEUE),
        run_us=values.get(_RUN),
        total_us=values.get(_TOTAL),
        batch_rows=None if rows is None else int(rows),
    )
