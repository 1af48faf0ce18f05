"""The `forwardpass` command: one table of subcommands, each imported only when it is called.

A command's module offers `add_arguments(parser)` and `run(args) -> int` (the exit status).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Collection, Sequence

from forwardpass import __version__
from forwardpass.errors import ForwardpassError

# name: (module, one-line summary)
COMMANDS = {
    "serve": ("forwardpass.cli.serve", "serve a model repository over gRPC"),
    "models": ("forwardpass.cli.models", "list what a server serves, what it does not, and why"),
    "load": ("forwardpass.cli.control", "have a server load a model, or load it again"),
    "unload": ("forwardpass.cli.control", "have a server stop serving a model"),
    "reload": ("forwardpass.cli.control", "have a server load a model again that it serves"),
    "stats": ("forwardpass.cli.control", "show what a server's models did so far"),
    "config": ("forwardpass.cli.control", "print a model's options, with those that the server chose"),
    "log-level": ("forwardpass.cli.control", "show or set the level of a server's log"),
    "predict": ("forwardpass.cli.predict", "send rows to a served model and print or save its answer"),
    "top": ("forwardpass.cli.top", "show what a server does now, in the terminal"),
    "export": ("forwardpass.export.command", "export a PyTorch network to ONNX with a numerical contract"),
    "trace": ("forwardpass.insight.forward_trace", "show a network's layers: shapes, costs, fusion, times, equations"),
    "represent": ("forwardpass.insight.represent", "show how separable the classes become, layer by layer"),
    "memory": ("forwardpass.insight.memory", "measure what a forward pass takes, and that a server keeps none of it"),
    "sweep": ("forwardpass.insight.sweep", "measure throughput and latency against batch size, and find the knee"),
    "loadtest": (
        "forwardpass.loadtest.command",
        "load a server: latency from when requests were due; the rate that an objective allows",
    ),
    "tune": ("forwardpass.loadtest.tune", "find the options of model.toml under which most answers are in time"),
    "flight": ("forwardpass.cli.flight", "draw what a server's flight recorder wrote: queue, runs, answers"),
    "plan": ("forwardpass.loadtest.plan", "find by simulation how many cores and pods a load needs"),
    "completion": ("forwardpass.cli.completion", "print a script that has a shell complete commands and options"),
}


def whole_parser() -> argparse.ArgumentParser:
    """The parser with the options of every command, except of those whose packages are not installed."""
    return _parser(COMMANDS)


def _parser(chosen: Collection[str | None]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="forwardpass", description="Serve small neural networks over gRPC.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"forwardpass {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
        )
        if name in chosen:
            try:
                importlib.import_module(module_name).add_arguments(command)
            except ForwardpassError:
                if len(chosen) == 1:
                    raise
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. A ForwardpassError is one line on stderr, not a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    try:
        # Importing a command's module may raise ForwardpassError for a package that is not installed.
        args = _parser([chosen]).parse_args(arguments)
        return int(importlib.import_module(COMMANDS[args.command][0]).run(args))
    except ForwardpassError as error:
        print(f"forwardpass {chosen}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of the output has exited (`forwardpass models | head -1`): not an error.
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
