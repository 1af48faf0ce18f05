"""When a process that ended is started again: at once, unless it keeps ending. Pure, with an injected clock."""

from __future__ import annotations

from typing import Final

SETTLED_SECONDS: Final = 10.0  # a process that was ready for as long is not in a loop
FIRST_WAIT: Final = 0.5  # seconds, from the second end in a row
LONGEST_WAIT: Final = 30.0


class RestartPolicy:
    """Of one place among the processes."""

    def __init__(self) -> None:
        self.ends = 0  # in a row

    def ended(self, ready_seconds: float) -> float:
        """Note that the process ended after it was ready for so long (0: it never was). Returns the seconds to wait."""
        self.ends = 1 if ready_seconds >= SETTLED_SECONDS else self.ends + 1
        if self.ends == 1:
            return 0.0
        return min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(self.ends - 2, 16))
