"""When a call that failed is made again, and after which pause. Pure: knows no channel and waits for nothing.

- UNAVAILABLE is tried again: nobody there, a connection that broke, a server that is stopping or still loading.
  Inference changes nothing at the server, so a call that was run and whose answer was lost may be made again.
- RESOURCE_EXHAUSTED is tried again only where the caller asked for that and the server said when to come back. A server
  that is full gets emptier by fewer calls, not by more.
- Nothing else is: the other refusals stay what they are, and a deadline that passed has passed.
- The pause is at least what the server asks for (google.rpc.RetryInfo); where it asks for nothing, it grows by three
  from 50 ms to 1 s, less up to half by chance, so that clients that failed together do not come back together.
- No pause reaches beyond the call's deadline: the error is raised at once instead, while it still says what is wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from forwardpass.client.errors import CallError, ResourceExhausted, Unavailable

FIRST: Final = 0.05  # seconds
FACTOR: Final = 3
LONGEST: Final = 1.0  # seconds that are waited unasked
LONGEST_ASKED: Final = 60.0  # seconds that a server may ask for; what asks for more is not waited for


@dataclass(frozen=True, slots=True)
class Retrying:
    """How often a call is made in all, and whether a full server is asked again."""

    attempts: int
    full: bool
    chance: Callable[[], float] = field(default=random.random)  # in [0, 1)

    def pause(self, error: CallError, attempt: int, left: float | None) -> float | None:
        """Seconds until attempt number `attempt` + 1; None: there is none.

        `left`: seconds until the call's deadline, None where it has none.
        """
        asked = error.retry_after
        again = isinstance(error, Unavailable) or (
            self.full and isinstance(error, ResourceExhausted) and asked is not None
        )
        if not again or attempt >= self.attempts or (asked is not None and asked > LONGEST_ASKED):
            return None
        if asked is None:
            pause = min(LONGEST, FIRST * FACTOR ** (attempt - 1)) * (1 - self.chance() / 2)
        else:
            pause = asked * (1 + self.chance() / 10)
        return None if left is not None and pause >= left else pause
