"""One worker process as the supervisor sees it: started, assigned, handed connections, ended."""

from __future__ import annotations

import array
import asyncio
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

from forwardpass.errors import Draining
from forwardpass.processes.channel import Channel
from forwardpass.processes.messages import Assignment, State
from forwardpass.transport.handed_listener import PortCounts

PORTS: Final = ("grpc", "http")
_NUMBERS = itertools.count(1)
KEEP_SECONDS: Final = 0.05  # between two looks at which connections were received
_BUFFER: Final = 1 << 18  # bytes of connections on their way: more than a listener's backlog of them


class HandedPort:
    """One port of one process: the connections that it was handed."""

    def __init__(self) -> None:
        self.counts, self.descriptor = PortCounts.made()
        try:
            self.channel, self.child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            os.close(self.descriptor)
            self.counts.close()
            raise
        self.channel.setblocking(False)
        self.channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self.handed = 0
        # Handed over and maybe not received yet, the oldest first: kept open here, so that another process can have
        # them if this one dies before.
        self._kept: deque[socket.socket] = deque()
        self._releasing: asyncio.TimerHandle | None = None

    @property
    def connections(self) -> int:
        """Those it has, and those that are on their way to it."""
        return self.counts.open + self.handed - self.counts.taken

    def hand(self, connection: socket.socket) -> bool:
        """Hand a connection over. Returns whether the process could be given it; only then it is no longer the
        caller's to close."""
        try:
            self.channel.sendmsg(
                [b"c"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [connection.fileno()]))]
            )
        except OSError:  # it is gone, or so busy that its buffer is full
            return False
        self.handed += 1
        self._kept.append(connection)
        if self._releasing is None:
            self._releasing = asyncio.get_running_loop().call_later(KEEP_SECONDS, self._release)
        return True

    def _release(self) -> None:
        """Close here what the process has received."""
        for _ in range(len(self._kept) - (self.handed - self.counts.taken)):
            self._kept.popleft().close()
        self._releasing = asyncio.get_running_loop().call_later(KEEP_SECONDS, self._release) if self._kept else None

    def not_taken(self) -> list[socket.socket]:
        """The connections that the process did not receive, now that it has ended: for the caller to close."""
        self._release()
        left, self._kept = list(self._kept), deque()
        return left

    def started(self) -> None:
        """The child has its own copies."""
        self.child.close()
        os.close(self.descriptor)

    def give_up(self) -> None:
        """No child could be started."""
        self.started()
        self.close()

    def close(self) -> None:
        self.channel.close()
        if self._releasing is not None:
            self._releasing.cancel()
        for connection in self._kept:
            connection.close()
        self.counts.close()


class WorkerProcess:
    """Used on the event loop. Once `ended` is set, `status` has its exit status, as subprocess has it."""

    def __init__(self, functions: Callable[[WorkerProcess], Mapping[str, Callable[..., Any]]]) -> None:
        """Start it. `functions`: what it may call, for this process. Call `open` next. Raises OSError, leaving nothing
        behind, where there are no descriptors or no memory for it."""
        self.number = next(_NUMBERS)  # never used again
        self.ports: dict[str, HandedPort] = {}
        self.state: State | None = None  # None: it serves nothing yet
        self.waits = asyncio.Event()  # it is ready for an assignment
        self.joined = asyncio.Event()  # its ports are open: it takes connections
        self.loaded = asyncio.Event()  # it serves the models that it could load
        self.ended = asyncio.Event()
        self.leaving = False  # it is handed no connection any more
        self.accepts = False  # it may be handed connections
        self.ready_since = 0.0  # on the monotonic clock; 0: it never was
        self.status = 0
        self.hung = False
        self.serving: bool | None = None  # what it was last told of whether the server is ready
        self.reported = 0  # the number of the last report that was taken
        self.turns = 0  # of the thread that reads the gRPC port, then
        with contextlib.ExitStack() as failed:
            for name in PORTS:
                self.ports[name] = port = HandedPort()
                failed.callback(port.give_up)
            own, child = socket.socketpair()
            failed.callback(own.close)
            with child:
                self._process = self._popen(child)
            failed.callback(self._process.wait)
            failed.callback(self._process.kill)
            self._watched = os.pidfd_open(self._process.pid)
            failed.pop_all()
        for port in self.ports.values():
            port.started()
        self.channel = Channel(own, functions(self))
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._watched, self._has_ended)

    def _popen(self, channel: socket.socket) -> subprocess.Popen[bytes]:
        passed = [channel.fileno()]
        for port in self.ports.values():
            passed += [port.child.fileno(), port.descriptor]
        command = [sys.executable, *subprocess._args_from_interpreter_flags(), "-m"]  # type: ignore[attr-defined]
        return subprocess.Popen(
            [*command, "forwardpass.processes.worker_main", ",".join(map(str, passed))],
            pass_fds=passed,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is for the supervisor, which asks its workers to drain
        )

    async def open(self) -> None:
        await self.channel.open()

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self, assignment: Assignment) -> None:
        """Give it its assignment, once it `waits`."""
        with contextlib.suppress(Draining):
            self.channel.tell("begin", assignment)

    def take(self, state: State) -> None:
        self.state = state
        if state.accepts:
            self.loaded.set()

    @property
    def ready(self) -> bool:
        """Whether it serves, and every model that should serve does."""
        return self.state is not None and self.state.accepts and self.state.complete

    def serves(self) -> set[str]:
        """The models that it serves."""
        return set() if self.state is None else {view.name for view in self.state.versions if view.serves}

    def hand(self, port: str, connection: socket.socket) -> bool:
        return self.ports[port].hand(connection)

    def stop(self) -> None:
        """Ask it to finish its calls and end. It is handed nothing any more."""
        self.leaving, self.accepts = True, False
        self.signal(signal.SIGTERM)

    def signal(self, number: signal.Signals) -> None:
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def close(self) -> None:
        """Once it has ended, and its connections were given to others."""
        for port in self.ports.values():
            port.close()

    @property
    def cause(self) -> str:
        """Why it ended, in a word."""
        if self.hung:
            return "hung"
        if self.status >= 0:
            return "exited"
        try:
            return signal.Signals(-self.status).name
        except ValueError:
            return f"signal {-self.status}"

    def _has_ended(self) -> None:
        status = self._process.poll()
        if status is None:
            return
        self.status = status
        self._loop.remove_reader(self._watched)
        os.close(self._watched)
        self.accepts = False
        self.ended.set()
        self._loop.call_soon(self.channel.close)  # after what it sent last was read
