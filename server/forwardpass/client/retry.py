"""Whether a failed call is retried, and after what pause. Pure: uses no channel and does not wait.

- UNAVAILABLE is retried: no server, a broken connection, a server that is stopping or still loading. Inference changes
  nothing on the server, so a call that was run but whose response was lost may be made again.
- RESOURCE_EXHAUSTED is retried only if the caller asked for that and the server sent a time to retry after. A full
  server is relieved by fewer calls, not by more.
- Nothing else is retried: other rejections would be repeated, and a passed deadline stays passed.
- The pause is at least what the server asks for (google.rpc.RetryInfo); otherwise it grows by a factor of three from
  50 ms to 1 s, randomly shortened by up to half, so that clients that failed together do not retry together.
- No pause reaches beyond the call's deadline: the error is raised at once instead, while it still names the cause.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from forwardpass.client.errors import CallError, ResourceExhausted, Unavailable

FIRST: Final = 0.05  # seconds
FACTOR: Final = 3
LONGEST: Final = 1.0  # seconds; longest pause if the server asks for none
LONGEST_ASKED: Final = 60.0  # seconds; if the server asks for more, the call is not retried


@dataclass(frozen=True, slots=True)
class Retrying:
    """The most attempts of a call, and whether a call is retried when the server is full."""

    attempts: int
    full: bool
    chance: Callable[[], float] = field(default=random.random)  # in [0, 1)

    def pause(self, error: CallError, attempt: int, left: float | None) -> float | None:
        """Seconds until attempt number `attempt` + 1; None: there is none.

        `left`: seconds until the call's deadline; None: it has none.
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
