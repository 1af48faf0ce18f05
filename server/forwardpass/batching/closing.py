"""When a batch that waits for more rows closes, and why. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from forwardpass.batching.request import Closed, QueueLimits, Request
from forwardpass.batching.run_time_model import RunTimeModel


def closing(waiting: Sequence[Request], limits: QueueLimits, run_time: RunTimeModel, rows: int) -> tuple[float, int]:
    """The time, and one of Closed, for `waiting` requests of `rows` rows, at least one."""
    close, why = min([r.arrival for r in waiting]) + limits.delay, Closed.DELAY
    urgent = min([r.deadline for r in waiting]) - run_time.upper_bound(rows)
    soonest = min([r.start_by for r in waiting])
    return min((close, why), (urgent, Closed.DEADLINE), (soonest, Closed.QUEUE_TIMEOUT))
