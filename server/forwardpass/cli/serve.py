"""`forwardpass serve`: run a server from its settings. The only place that sets up the process itself."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import sys
from collections.abc import Callable
from functools import partial

from forwardpass import settings as settings_module
from forwardpass.errors import ForwardpassError, SettingsError
from forwardpass.observability import log_lines
from forwardpass.server.stop import ignore_early
from forwardpass.settings import Settings

add_arguments = settings_module.add_arguments


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status: 0 after a drain, 1 when nothing could be served.

    After a device was lost the process exits here, with 1; and with 0 if a load could not be interrupted.
    """
    settings = settings_module.from_sources(vars(args))
    ignore_early()
    handler = log_lines.set_up(settings.log_format, settings.log_level)
    if settings.log_format == "console":
        return _serve(settings, _say)
    try:
        return _serve(settings, partial(log_lines.emit, handler))
    except ForwardpassError as error:  # what the command prints as a line of text
        log_lines.emit(handler, str(error), logging.CRITICAL)
        return 1


def _serve(settings: Settings, say: Callable[[str], None]) -> int:
    if not settings.repository.is_dir():
        raise SettingsError(f"the repository {settings.repository} is not a folder")
    # Imported here: `forwardpass serve --help` needs neither gRPC nor ONNX Runtime.
    from forwardpass.execution import cpu_budget
    from forwardpass.processes import process_count

    if settings.processes != 1:
        chosen = process_count.of(settings, cpu_budget.available())
        say(f"processes {chosen.processes} ({chosen.why})")
        if chosen.processes > 1:
            from forwardpass.processes.supervisor import Supervisor

            return asyncio.run(Supervisor(settings, chosen.processes, cpu_budget.available(), say).run())
    from forwardpass.server.server import Server

    server = Server(settings, cpu_budget.available(), say=say)
    # Objects made at start-up live as long as the process: keep the garbage collector from scanning them on every pass.
    gc.collect()
    gc.freeze()
    status = asyncio.run(server.run())
    if server.lost or server.unfinished:
        # At teardown ONNX Runtime frees its device resources, and hangs or aborts if the device no longer responds.
        # And the interpreter would wait for a load that cannot be interrupted, or abort because of it.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    return status


def _say(line: str) -> None:
    print(line, flush=True)
