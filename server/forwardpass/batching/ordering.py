"""The order in which requests wait. Pure: no queue, no clock.

Within a priority the queue is ordered by when each request is due:

    due = min(deadline, end of its queue timeout, arrival + PATIENCE · drain time)

where the drain time is how long all that waits or runs at its arrival takes. The last of the three decides unless a
deadline is so near that first come, first served could miss it. From that follows:

- Requests whose deadlines are far wait no longer than those without one, which are served in the order of arrival.
- A deadline within the drain time goes before all that could have waited longer.
- What arrives after a request was due goes behind it. So, whatever deadlines others state, a request waits for PATIENCE
  drain times and for what is then before it, which is one more at most.
"""

from __future__ import annotations

from forwardpass.batching.run_time_model import RunTimeModel

# Drain times until a request without a deadline is due. Requests that wait have arrived within the last one, if they
# are served in order; so with 2 they are due in one to two drain times from now, and a deadline in less than one goes
# before all of them. With less it would not; with more it could wait longer than it can afford.
PATIENCE = 2.0


def patience(
    run_time: RunTimeModel, max_batch_rows: int, groups: int, running_rows: int, instances: int
) -> tuple[float, float]:
    """PATIENCE drain times as (base, row): base + row · rows that wait, in seconds from a request's arrival.

    They are of full batches, of one that is not full for each of `groups`, and of what runs.
    """
    a, b, times = run_time.a, run_time.b, PATIENCE / instances
    return times * (a * (groups + 1) + b * running_rows), times * (a / max_batch_rows + b)
