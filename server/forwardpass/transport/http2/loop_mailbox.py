"""Functions for an event loop, from any thread: those posted before it comes to them are one call of the loop."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from functools import partial

from forwardpass.observability.log_limit import LogLimit

logger = logging.getLogger(__name__)
logger.addFilter(LogLimit())


class LoopMailbox:
    """Thread-safe."""

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        """`call_soon` schedules a function on the loop, from any thread."""
        self._call_soon = call_soon
        self._posted: list[Callable[[], object]] = []
        self._lock = threading.Lock()

    def post(self, function: Callable[..., object], *arguments: object) -> None:
        """Schedule a function on the event loop; those of one thread run in order."""
        with self._lock:
            self._posted.append(partial(function, *arguments))
            if len(self._posted) > 1:
                return
        with contextlib.suppress(RuntimeError):  # the loop is closed: no client waits any more
            self._call_soon(self._run)

    def _run(self) -> None:
        with self._lock:
            posted, self._posted = self._posted, []
        for function in posted:
            try:
                function()
            except Exception:
                logger.exception("an event of a call could not be handled")
