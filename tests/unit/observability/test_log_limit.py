"""A log line that repeats: one a second, with the count of those left out."""

from __future__ import annotations

import logging

import pytest

from forwardpass.observability.log_limit import TEXTS, LogLimit


class Log:
    """A logger with the limit, a clock that is set by hand, and what was logged."""

    def __init__(self) -> None:
        self.now = 100.0
        self.lines: list[str] = []
        self.logger = logging.Logger("test")
        self.logger.addFilter(LogLimit(lambda: self.now))
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(record.getMessage())  # type: ignore[method-assign]
        self.logger.addHandler(handler)


@pytest.fixture
def log() -> Log:
    return Log()


def test_a_repeated_line_is_logged_once_a_second_with_what_was_left_out(log: Log) -> None:
    for _ in range(1000):
        log.logger.warning("it failed: %s", "reset")
    log.now += 0.9
    log.logger.warning("it failed: %s", "reset")
    assert log.lines == ["it failed: reset"]
    log.now += 0.1
    for _ in range(5):
        log.logger.warning("it failed: %s", "reset")
    assert log.lines[1:] == ["it failed: reset (1000 more times since the last such line)"]
    log.now += 5.0
    log.logger.warning("it failed: %s", "reset")
    assert log.lines[2:] == ["it failed: reset (4 more times since the last such line)"]
    log.now += 5.0
    log.logger.warning("it failed: %s", "reset")
    assert log.lines[3:] == ["it failed: reset"]


def test_other_lines_are_not_held_up(log: Log) -> None:
    for _ in range(3):
        log.logger.warning("it failed: %s", "reset")
        log.logger.warning("it failed: %s", "100 %")
    assert log.lines == ["it failed: reset", "it failed: 100 %"]


def test_what_is_remembered_has_a_bound(log: Log) -> None:
    for i in range(3 * TEXTS):
        log.logger.warning("line %d", i)
    (limit,) = log.logger.filters
    assert isinstance(limit, LogLimit) and len(limit._known) == TEXTS
