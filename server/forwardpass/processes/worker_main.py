"""A worker process: `python -m forwardpass.processes.worker_main FDS`, started by the supervisor alone.

It imports everything, says that it waits, and becomes a server once it is given an assignment. So a process that waits
takes the place of one that died without delay. It ends as a server does, or when the supervisor is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from forwardpass.errors import Draining, ForwardpassError
from forwardpass.execution.shared_weights import SharedWeights
from forwardpass.observability import log_lines
from forwardpass.processes.channel import Channel
from forwardpass.processes.messages import Assignment
from forwardpass.processes.worker_link import WorkerLink
from forwardpass.server.server import Server
from forwardpass.server.stop import ignore_early
from forwardpass.transport.handed_listener import HandedListener, PortCounts


def run(descriptors: Sequence[int]) -> int:
    """Serve until told to stop. `descriptors`: of the channel, then of each port its connections and its counts."""
    ignore_early()
    status, finished = asyncio.run(_run(*descriptors))
    if not finished:
        logging.shutdown()
        os._exit(status)  # see `cli.serve`
    return status


async def _run(link: int, grpc: int, grpc_counts: int, http: int, http_counts: int) -> tuple[int, bool]:
    """Returns the exit status, and whether the interpreter can end: no thread is left that it would wait for."""
    assigned: asyncio.Future[Assignment] = asyncio.get_running_loop().create_future()
    listeners = [
        HandedListener(socket.socket(fileno=port), 0, PortCounts(counts))
        for port, counts in ((grpc, grpc_counts), (http, http_counts))
    ]
    functions = {"begin": assigned.set_result}
    channel = Channel(socket.socket(fileno=link), functions)
    group = WorkerLink(channel, *listeners)
    functions |= group.functions()
    await channel.open()
    channel.tell("waits")
    ended = asyncio.ensure_future(channel.ended.wait())
    await asyncio.wait((assigned, ended), return_when=asyncio.FIRST_COMPLETED)
    if not assigned.done():
        return 0, True
    assignment = assigned.result()
    for listener, port in zip(listeners, (assignment.grpc_port, assignment.http_port), strict=True):
        listener.port = port
    settings = assignment.settings
    log_lines.set_up(settings.log_format, settings.log_level)

    def say(line: str) -> None:
        with contextlib.suppress(Draining):
            channel.tell("say", line)

    def orphaned(ended: asyncio.Future[Any]) -> None:
        if not ended.cancelled():  # as it is where this process ends by itself, with a status of its own
            os.kill(os.getpid(), signal.SIGTERM)  # the supervisor is gone, and nobody else would end this process

    ended.add_done_callback(orphaned)
    try:
        server = Server(settings, assignment.cores, say, group)
        server.repository.opens = SharedWeights(assignment.weights).open
        if assignment.known is not None:
            server.repository.measurements.learn(assignment.known)
        gc.collect()
        gc.freeze()
        status = await server.run()
        return status, not (server.lost or server.unfinished or group.unfinished)
    except ForwardpassError as error:
        say(str(error))
        return 1, not group.unfinished


if __name__ == "__main__":
    sys.exit(run([int(text) for text in sys.argv[1].split(",")]))
