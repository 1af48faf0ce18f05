"""Which models stay loaded in the memory that models may take, and when a load that failed is tried again. Pure.

The unit is a model, with all versions that are served of it. Times are in seconds on the caller's clock, sizes in
bytes. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from forwardpass.errors import RequestError

FRESH = 1.0  # seconds from its load in which a model that has not run is not evicted: those who waited come first
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 64.0  # seconds between attempts to load a model that fails; doubled each time


class Use(NamedTuple):
    """What is known of a loaded model when room is needed."""

    last: float  # when it was loaded, or ended a run
    busy: bool  # whether it has requests
    fresh: bool = False  # loaded a moment ago, and has not run since


class Plan(NamedTuple):
    """What must be evicted for a load; the load fits only where `fits`, and never will where `never`."""

    fits: bool
    victims: tuple[str, ...] = ()  # the first to go first
    never: bool = False
    taken: int = 0  # bytes that cannot be had: of models that have requests, are fresh or are being loaded


class ModelMemory:
    """What each model counts for, loaded or about to be.

    - The sum is at most `limit` after every `plan` that fits, its victims taken out, unless `count` was told more.
    - A victim is loaded, not busy, not fresh; of those it is the one that was used the longest ago. No more are taken
      than are needed, and none where the load does not fit anyway.
    """

    def __init__(self, limit: int) -> None:
        """`limit` 0: there is none."""
        self.limit = limit
        self._counts: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self._counts.values())

    @property
    def names(self) -> set[str]:
        """Of the models that are counted."""
        return set(self._counts)

    def of(self, name: str) -> int | None:
        """What a model counts for; None: it is not counted."""
        return self._counts.get(name)

    def count(self, name: str, nbytes: int) -> None:
        """Count a model as taking so much from now on."""
        self._counts[name] = nbytes

    def forget(self, name: str) -> None:
        self._counts.pop(name, None)

    def plan(self, name: str, nbytes: int, uses: Mapping[str, Use]) -> Plan:
        """Make room for a model, and count it; its victims are no longer counted. Changes nothing where it doesn't fit.

        `uses`: of every loaded model. A model that is counted and has no use is being loaded.
        """
        others = self.total - self._counts.get(name, 0)
        if self.limit and nbytes > self.limit:
            return Plan(False, never=True, taken=others)
        over = others + nbytes - self.limit if self.limit else 0
        victims: list[str] = []
        if over > 0:
            idle = [
                other
                for other, use in uses.items()
                if other != name and other in self._counts and not use.busy and not use.fresh
            ]
            for other in sorted(idle, key=lambda other: uses[other].last):
                if over <= 0:
                    break
                if self._counts[other]:
                    victims.append(other)
                    over -= self._counts[other]
            if over > 0:
                return Plan(False, taken=others - sum(self._counts[victim] for victim in victims))
        for victim in victims:
            del self._counts[victim]
        self._counts[name] = nbytes
        return Plan(True, tuple(victims))


class BackOff:
    """When models whose loads failed may be tried again: after 1, 2, 4 ... 64 s; and with which error till then."""

    def __init__(self) -> None:
        self._failed: dict[str, tuple[float, float, RequestError]] = {}  # by model: from when on, the pause, the error

    def failed(self, name: str, error: RequestError, now: float, *, grows: bool = True) -> float:
        """Returns the pause in seconds. `grows`: each failure in a row doubles it."""
        before = self._failed.get(name)
        pause = FIRST_PAUSE if before is None or not grows else min(LONGEST_PAUSE, 2 * before[1])
        self._failed[name] = (now + pause, pause, error)
        return pause

    def worked(self, name: str) -> None:
        """Forget its failures: it was loaded, is gone, or was changed."""
        self._failed.pop(name, None)

    def error(self, name: str, now: float) -> RequestError | None:
        """The error for requests for a model that may not be tried yet; None: it may."""
        found = self._failed.get(name)
        return None if found is None or now >= found[0] else found[2]

    def __contains__(self, name: object) -> bool:
        return name in self._failed
