"""`forwardpass load`, `unload`, `reload`, `stats`, `config`, `log-level`: what an administrator asks of a server.

Which of them is in the parser's prog, whose last word is the command.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time

from forwardpass.client import Client, ModelStats
from forwardpass.client.control import LEVELS
from forwardpass.console import connection_options, tables
from forwardpass.errors import ForwardpassError

_LOAD_SECONDS = 300.0  # a load replays the contract and measures batch sizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command in the parser's prog."""
    command = parser.prog.split()[-1]
    if command in ("load", "unload", "reload"):
        parser.add_argument("models", nargs="+", metavar="MODEL", help="the models' names")
    elif command == "stats":
        parser.add_argument("model", nargs="?", default="", metavar="MODEL", help="[all]")
    elif command == "config":
        parser.add_argument("model", metavar="MODEL", help="the model's name")
        parser.add_argument("--version", default="", help="[the server's choice]")
    else:
        parser.add_argument("level", nargs="?", choices=LEVELS, help="[only show it]")
    if command == "stats":
        parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    connection_options.add_call_arguments(parser)
    if command in ("load", "reload"):
        parser.set_defaults(timeout=_LOAD_SECONDS)


def run(args: argparse.Namespace) -> int:
    """Run the command in `args.command`. Raises ForwardpassError, whose text is one line."""
    with connection_options.client_of(args) as client:
        match args.command:
            case "load" | "reload":
                for model in args.models:
                    _load(client, model, again=args.command == "reload")
            case "unload":
                for model in args.models:
                    client.unload(model)
                    print(f"{model}: not served any more")
            case "stats":
                _show_statistics(client.statistics(args.model), args.json)
            case "config":
                print(json.dumps(client.config(args.model, version=args.version), indent=2, ensure_ascii=False))
            case _:
                print(client.log_level(args.level))
    return 0


def _load(client: Client, model: str, again: bool) -> None:
    if again and not any(state.name == model and state.state == "READY" for state in client.models()):
        raise ForwardpassError(
            f"{model} is not served, so that there is nothing to load again: forwardpass load {model}"
        )
    began = time.monotonic()
    client.load(model)
    versions = ", ".join(client.metadata(model).versions)
    print(f"{model}: version {versions} serves, after {time.monotonic() - began:.1f} s")


def _show_statistics(found: list[ModelStats], as_json: bool) -> None:
    if as_json:
        print(json.dumps([dataclasses.asdict(stats) for stats in found], ensure_ascii=False))
        return
    header = ["NAME", "VERSION", "REQUESTS", "FAILED", "ROWS", "BATCHES", "ROWS/BATCH", "TOTAL", "QUEUE", "RUN", "LAST"]
    rows = [
        [
            stats.name,
            stats.version,
            *(f"{count:,}" for count in (stats.requests, stats.failed, stats.rows, stats.batches)),
            "-" if stats.mean_batch is None else f"{stats.mean_batch:.1f}",
            *(_seconds(mean) for mean in (stats.mean_total, stats.mean_queue, stats.mean_run)),
            "-" if stats.last_request is None else time.strftime("%F %T", time.localtime(stats.last_request)),
        ]
        for stats in found
    ]
    print(tables.table(header, rows, (0, 1)))


def _seconds(mean: float | None) -> str:
    return "-" if mean is None else tables.si(mean, "s")
