"""The supervisor's ports: it accepts every connection and hands it to the process that has the fewest."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from forwardpass.observability.log_limit import LogLimit
from forwardpass.processes.spread import excess, least_loaded
from forwardpass.processes.worker_process import WorkerProcess
from forwardpass.transport import addresses
from forwardpass.transport.listeners import ACCEPTS, ONE_CONNECTION, accepts

logger = logging.getLogger(__name__)
logger.addFilter(LogLimit())

PAUSE_SECONDS: Final = 0.2  # before connections are accepted again, where none could be or no process takes any
BUSY_SECONDS: Final = 0.02  # before a connection is offered again that every process was too busy to be given


class PortSpread:
    """One port. Used on the event loop."""

    def __init__(self, name: str, host: str, port: int, processes: Callable[[], Sequence[WorkerProcess]]) -> None:
        """Bind. Raises OSError if that fails. `name`: of the port in a WorkerProcess. `processes`: who takes part."""
        self._name = name
        self._processes = processes
        self._listeners = addresses.listen(host, port)
        first = self._listeners[0]
        self.port = 0 if first.family == socket.AF_UNIX else int(first.getsockname()[1])
        self._loop = asyncio.get_running_loop()
        self._last: list[WorkerProcess] = []  # the one that got a connection last comes last
        self._waiting: deque[socket.socket] = deque()  # connections that no process could be given yet
        self._offering: asyncio.TimerHandle | None = None

    def start(self) -> None:
        for listener in self._listeners:
            self._loop.add_reader(listener, self._accept, listener)

    def works(self) -> bool:
        """Whether every listener still listens."""
        return all(map(accepts, self._listeners))

    def close(self) -> None:
        """Accept no more. Connections that the kernel has accepted already are still handed over."""
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            self._loop.remove_reader(listener)
            with contextlib.suppress(OSError):
                while True:
                    self.hand(listener.accept()[0])
            addresses.close(listener)
        if self._offering is not None:
            self._offering.cancel()
        self._offer()
        if self._waiting:
            logger.warning("%d connections are closed: no process could take them", len(self._waiting))
        for connection in self._waiting:
            connection.close()
        self._waiting.clear()

    def even_out(self) -> None:
        """Have processes with too many connections ask clients to connect anew."""
        here = {process: process.ports[self._name].connections for process in self._processes()}
        for process, count in excess(here).items():
            process.channel.tell("part_with", count)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS):
            if self._waiting or not any(process.accepts for process in self._processes()):
                self._pause(listener, BUSY_SECONDS if self._waiting else PAUSE_SECONDS)
                return
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in ONE_CONNECTION:
                    continue
                logger.warning("no connection can be accepted: %s", error.strerror)
                self._pause(listener, PAUSE_SECONDS)
                return
            self.hand(connection)

    def hand(self, connection: socket.socket) -> None:
        """Hand a connection to a process, as soon as one can take it."""
        if self._waiting or not self._handed(connection):
            self._waiting.append(connection)
            self._offer_later()

    def _offer(self) -> None:
        while self._waiting and self._handed(self._waiting[0]):
            self._waiting.popleft()

    def _offer_later(self) -> None:
        def offer() -> None:
            self._offering = None
            self._offer()
            if self._waiting:
                self._offer_later()

        if self._offering is None:
            self._offering = self._loop.call_later(BUSY_SECONDS, offer)

    def _handed(self, connection: socket.socket) -> bool:
        """Hand a connection to the process that has the fewest. Returns whether any could be given it."""
        able = [process for process in self._in_turn() if process.accepts]
        while able:
            here = {process: process.ports[self._name].connections for process in able}
            everywhere = {process: sum(p.connections for p in process.ports.values()) for process in able}
            chosen = least_loaded(here, everywhere)
            assert chosen is not None
            if chosen.hand(self._name, connection):
                self._last.remove(chosen)
                self._last.append(chosen)
                return True
            able.remove(chosen)
        return False

    def _in_turn(self) -> list[WorkerProcess]:
        """The processes, the one that was handed a connection last at the end."""
        processes = self._processes()
        self._last = [p for p in self._last if p in processes]
        self._last[:0] = [p for p in processes if p not in self._last]
        return self._last.copy()

    def _pause(self, listener: socket.socket, seconds: float) -> None:
        """Leave connections in the kernel's backlog for a moment."""
        self._loop.remove_reader(listener)
        self._loop.call_later(seconds, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            self._loop.add_reader(listener, self._accept, listener)
