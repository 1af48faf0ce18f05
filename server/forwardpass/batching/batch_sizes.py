"""How many requests from the front of a queue make a batch, where deadlines don't decide. Pure: nothing is changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from forwardpass.batching.request import SETTLED, Request, RequestT


def prefix(group: list[RequestT], limit: int) -> list[RequestT]:
    """As many requests from the front as fit `limit` rows; at least one."""
    rows = group[0].rows
    count = 1
    for request in group[1:limit]:
        rows += request.rows
        if rows > limit:
            break
        count += 1
    return group[:count]


def preferred_count(group: Iterable[Request], sizes: Collection[int], limit: int) -> int:
    """How many requests from the front make the largest feasible one of the preferred `sizes`; 0: none is feasible."""
    best = rows = 0
    for count, request in enumerate(group, 1):
        rows += request.rows if request.state != SETTLED else 0
        if rows in sizes:
            best = count
        elif rows > limit:
            break
    return best
