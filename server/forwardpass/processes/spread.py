"""Which process gets a new connection, and how many each must give away to be even. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

P = TypeVar("P")


def least_loaded(here: Mapping[P, int], everywhere: Mapping[P, int]) -> P | None:
    """The process with the fewest connections on one port, of those the one with the fewest in all; None: no process.

    Where that is even too, the first: `here` must have the one that was chosen the longest ago first.
    """
    return min(here, key=lambda process: (here[process], everywhere[process]), default=None)


def excess(counts: Mapping[P, int]) -> dict[P, int]:
    """How many connections each process must give away so that no two differ by more than one.

    Nothing while they differ by one: a connection that moves costs its client a connect.
    """
    if not counts or max(counts.values()) - min(counts.values()) < 2:
        return {}
    even, rest = divmod(sum(counts.values()), len(counts))
    most_first = sorted(counts, key=lambda process: -counts[process])
    targets = {process: even + (place < rest) for place, process in enumerate(most_first)}
    return {process: count - targets[process] for process, count in counts.items() if count > targets[process]}
