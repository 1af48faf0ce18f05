"""`forwardpass flight`: a dump of the flight recorder, summed up, and drawn as a page or a trace."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from forwardpass.errors import ForwardpassError
from forwardpass.flight import dump_file
from forwardpass.flight.summary import as_text
from forwardpass.flight.timeline_page import as_html
from forwardpass.flight.trace_events import as_trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="as SIGUSR1 has a server write it")
    parser.add_argument("--html", type=Path, metavar="OUT", help="write a page with a timeline there")
    parser.add_argument(
        "--trace", type=Path, metavar="OUT", help="write a trace for ui.perfetto.dev or chrome://tracing"
    )


def run(args: argparse.Namespace) -> int:
    """Print the summary and write what was asked for. Returns the exit status."""
    dump = dump_file.read(args.file)
    print(as_text(dump), end="")
    if args.html is not None:
        _write(args.html, as_html(dump))
    if args.trace is not None:
        _write(args.trace, json.dumps(as_trace(dump), ensure_ascii=False) + "\n")
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ForwardpassError(f"{path} cannot be written: {error.strerror}") from None
    print(f"written: {path}")
