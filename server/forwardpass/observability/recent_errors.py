"""The last errors that requests were answered with: a small ring, for the status page.

Fed only where an error is made, so that a request which succeeds costs nothing. Texts are those that clients got, cut
short; no tensor, token or metadata is ever passed here.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from forwardpass.errors import Reason, printable

KEPT = 32  # errors
LONGEST = 300  # characters of a text
VALUES = re.compile(r"(cannot be run on these values): .*", re.DOTALL)  # ONNX Runtime's word for why quotes a value
MERGE_SECONDS = 1.0  # errors of one code and reason that follow each other this closely share an entry


class RecentError(NamedTuple):
    """`times` errors of one kind that came at once or within MERGE_SECONDS of each other; `text` is the last one's."""

    at: float  # seconds since 1970, of the last
    code: str
    reason: str
    text: str
    times: int


class RecentErrors:
    """The last KEPT errors, with those that repeat merged, so that a flood does not wash out the rest. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._ring: deque[RecentError] = deque(maxlen=KEPT)
        self._lock = threading.Lock()

    def add(self, code: str, reason: Reason, text: str, times: int = 1) -> None:
        now = self._clock()
        shown = printable(VALUES.sub(r"\1; the client has the details", text), LONGEST)
        with self._lock:
            for place in range(len(self._ring) - 1, -1, -1):
                known = self._ring[place]
                if now - known.at > MERGE_SECONDS:
                    break
                if (known.code, known.reason) == (code, reason):
                    del self._ring[place]
                    times += known.times
                    break
            self._ring.append(RecentError(now, code, str(reason), shown, times))

    def list(self) -> list[RecentError]:
        """Oldest first."""
        with self._lock:
            return [*self._ring]
