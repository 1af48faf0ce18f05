"""Limits a repeated log line to one per second: for loggers of events that clients can cause as often as they like."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import monotonic

SECONDS = 1.0  # between two equal lines
TEXTS = 64  # lines remembered; beyond that the oldest is forgotten, and may be logged once more


class LogLimit(logging.Filter):
    """`logger.addFilter(LogLimit())`. Thread-safe.

    A line repeated within SECONDS is dropped, with its traceback; the next one that is logged has their count.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._known: dict[str, tuple[float, int]] = {}  # by text: when it was last logged, how often dropped since
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        now = self._clock()
        with self._lock:
            logged, left_out = self._known.pop(text, (float("-inf"), 0))
            due = now - logged >= SECONDS
            self._known[text] = (now, 0) if due else (logged, left_out + 1)
            if len(self._known) > TEXTS:
                self._known.pop(next(iter(self._known)))
        if due and left_out:
            record.msg, record.args = f"{text} ({left_out} more times since the last such line)", ()
        return due
