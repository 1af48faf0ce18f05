"""How log lines are written: for people, or one JSON object a line. Formatters for the standard library's logging.

What a line has beside its message stands in `extra=fields(...)`: JSON writes each as a key of its own, the console as
key=value. A traceback is one of the keys, so that a line stays one event.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, TextIO

CONSOLE_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
PRINTED: Final = "forwardpass"  # the logger named in JSON for lines that a console has on stdout
_KEY: Final = "forwardpass_fields"


def fields(**values: Any) -> dict[str, Any]:
    """For `extra`: keys and values of a line. None is left out."""
    return {_KEY: {name: value for name, value in values.items() if value is not None}}


def _fields_of(record: logging.LogRecord) -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(record, _KEY, {})
    return found


class ConsoleFormatter(logging.Formatter):
    """A line for people; fields follow the message."""

    def __init__(self) -> None:
        super().__init__(CONSOLE_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        line = super().formatMessage(record)
        return " ".join([line, *(f"{name}={value}" for name, value in _fields_of(record).items())])


class JsonFormatter(logging.Formatter):
    """One JSON object in ASCII, on one line: time (RFC 3339, UTC), level, logger, message, and the line's fields."""

    def format(self, record: logging.LogRecord) -> str:
        seconds, micros = divmod(round(record.created * 1e6), 1_000_000)
        line: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{micros:06d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        for name, value in _fields_of(record).items():
            line.setdefault(name, value)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return json.dumps(line, default=str)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:  # arguments that do not fit: the event must not be lost, nor break the stream
        return f"{record.msg} (its arguments could not be formatted: {error})"


def set_up(style: str, level: str) -> logging.Handler:
    """Configure the root logger: `console` on stderr, or `json` on stdout, with everything else that Python prints.

    Returns the handler.
    """
    stream: TextIO = sys.stdout if style == "json" else sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if style == "json" else ConsoleFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    if style == "json":
        logging.captureWarnings(True)
        warnings.simplefilter("default")
        sys.excepthook = _uncaught
        threading.excepthook = _uncaught_in_thread
    return handler


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger(PRINTED).critical("an error that nothing caught", exc_info=(kind, error, trace))


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        name = args.thread.name if args.thread is not None else "?"
        trace = (args.exc_type, args.exc_value, args.exc_traceback)
        logging.getLogger(PRINTED).critical("an error that nothing caught ended thread %s", name, exc_info=trace)


def emit(handler: logging.Handler, message: str, level: int = logging.INFO) -> None:
    """Write a line whatever the level of the log: what a console has on stdout, such as `ready`."""
    handler.handle(logging.LogRecord(PRINTED, level, "", 0, message, None, None))
