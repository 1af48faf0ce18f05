"""Log lines: whatever is logged, one line of JSON is one event with its time, level, logger and message."""

from __future__ import annotations

import io
import json
import logging
import re
import threading
from typing import Any

import pytest

from forwardpass.observability.log_lines import ConsoleFormatter, JsonFormatter, emit, fields


@pytest.fixture
def log() -> tuple[logging.Logger, io.StringIO]:
    """A logger of the test's own, and the stream that it writes to."""
    stream = io.StringIO()
    logger = logging.Logger("forwardpass.some")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    return logger, stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    text = stream.getvalue()
    assert text.isascii() and text.endswith("\n")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


@pytest.mark.parametrize(
    "text", ["plain", "two\nlines\r\n", "\x00\x1b[31m\u2028\u2029\x85", "ü€😀", "\udcff", '"}{', "%s %d"]
)
def test_any_text_is_one_line(log: tuple[logging.Logger, io.StringIO], text: str) -> None:
    logger, stream = log
    logger.warning("%s", text, extra=fields(model=text, nothing=None))
    (line,) = lines(stream)
    assert (line["message"], line["model"], line["level"], line["logger"]) == (
        text,
        text,
        "warning",
        "forwardpass.some",
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["time"]) and "nothing" not in line


def test_a_traceback_is_a_field(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = log
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        logger.exception("it failed")
    (line,) = lines(stream)
    assert line["message"] == "it failed" and line["traceback"].endswith("ValueError: first\nsecond")


def test_arguments_that_do_not_fit_lose_no_event(
    log: tuple[logging.Logger, io.StringIO], capsys: pytest.CaptureFixture[str]
) -> None:
    logger, stream = log
    logger.error("%d rows", "three")
    logger.error("an object: %s", object())
    logger.info("fields of any kind", extra=fields(thing=object(), time="no", level="no"))
    first, _, third = lines(stream)
    assert first["message"].startswith("%d rows (its arguments could not be formatted: ")
    assert third["thing"].startswith("<object") and third["level"] == "info" and third["time"] != "no"
    assert not capsys.readouterr().err


def test_times_are_exact_at_the_edge_of_a_second() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "m", None, None)
    for created, shown in ((0.0, "1970-01-01T00:00:00.000000Z"), (1.9999996, "1970-01-01T00:00:02.000000Z")):
        record.created = created
        assert json.loads(JsonFormatter().format(record))["time"] == shown


def test_threads_write_whole_lines(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = log
    threads = [
        threading.Thread(target=lambda i=i: [logger.info("x" * 500, extra=fields(i=i, j=j)) for j in range(200)])
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((line["i"], line["j"]) for line in lines(stream)) == [(i, j) for i in range(4) for j in range(200)]


def test_what_the_server_says_is_written_at_any_level() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    emit(handler, "ready")
    assert lines(stream)[0]["message"] == "ready"


def test_a_console_has_the_fields_after_the_message() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "request", None, None)
    record.__dict__.update(fields(model="m", rows=3))
    assert ConsoleFormatter().format(record).endswith(" INFO x: request model=m rows=3")
