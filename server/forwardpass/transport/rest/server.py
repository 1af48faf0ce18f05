"""The HTTP port: its listeners and connections, on the server's event loop.

- An idle connection is closed after IDLE_SECONDS; `connection` has the other bounds of one.
- Connections are bounded; one that is accepted beyond the bound is closed at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from typing import Any, Final

from uvicorn.config import Config
from uvicorn.server import ServerState

from forwardpass.observability.log_limit import LogLimit
from forwardpass.security.certificates import Certificates
from forwardpass.transport import addresses
from forwardpass.transport.handed_listener import HandedListener, Listener, PortCounts
from forwardpass.transport.listeners import ACCEPTS, ONE_CONNECTION, accepts
from forwardpass.transport.rest.application import RestApplication
from forwardpass.transport.rest.connection import RestConnection

logger = logging.getLogger(__name__)
logger.addFilter(LogLimit())
logging.getLogger("uvicorn.error").addFilter(LogLimit())  # it has a line for every malformed request

HANDSHAKE_SECONDS: Final = 10.0  # of TLS
IDLE_SECONDS: Final = 75.0  # longer than load balancers keep a connection, so that they close it and not this end
PAUSE_SECONDS: Final = 1.0  # before connections are accepted again after a failure of the machine
MOST_CONNECTIONS: Final = 4096


class RestServer:
    """Listeners and connections of the HTTP port. Used on the event loop."""

    def __init__(
        self, application: RestApplication, max_head_bytes: int, most_connections: int = MOST_CONNECTIONS
    ) -> None:
        self._application = application
        self._most = most_connections
        bounds = {
            "max_head_bytes": max_head_bytes, "budget": application.budget, "closed": staticmethod(self._note_open)
        }  # fmt: skip
        self._connection = type("BoundedConnection", (RestConnection,), bounds)
        # `loaded_app` is all that a connection takes from the configuration beside these.
        self._config = Config(
            application, http="httptools", ws="none", lifespan="off", interface="asgi3", log_config=None,
            access_log=False, proxy_headers=False, server_header=False, date_header=False,
            timeout_keep_alive=int(IDLE_SECONDS),
        )  # fmt: skip
        self._config.load()
        self._state = ServerState()
        self._listeners: list[Listener] = []
        self._counts: PortCounts | None = None
        self._certificates: Certificates | None = None
        self._handshakes: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()

    def listen(
        self, host: str, port: int, certificates: Certificates | None = None, handed: HandedListener | None = None
    ) -> int:
        """Bind, or take connections from `handed`. Returns the port. `certificates` None: plaintext. Raises OSError."""
        self._certificates = certificates
        self._listeners = [handed] if handed is not None else [*addresses.listen(host, port)]
        self._counts = None if handed is None else handed.counts
        first = self._listeners[0]
        return 0 if first.family == socket.AF_UNIX else int(first.getsockname()[1])

    def start(self) -> None:
        """Accept connections."""
        for listener in self._listeners:
            self._loop.add_reader(listener, self._accept, listener)

    @property
    def connections(self) -> int:
        """Open connections, those whose TLS handshake is under way included."""
        return len(self._state.connections) + len(self._handshakes)

    def accepts(self) -> bool:
        """Whether every listener still works."""
        return all(map(accepts, self._listeners))

    def _accept(self, listener: Listener) -> None:
        for _ in range(ACCEPTS):
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in ONE_CONNECTION:
                    continue
                logger.warning("no HTTP connection can be accepted: %s", error.strerror)
                self._loop.remove_reader(listener)
                self._loop.call_later(PAUSE_SECONDS, self._resume, listener)
                return
            if self.connections >= self._most:
                logger.warning("an HTTP connection was refused: %d are open, the bound", self._most)
                sock.close()
                continue
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:
                # asyncio does so only for sockets of protocol IPPROTO_TCP, and these say 0. Without it the rest of a
                # large response waits for the client's delayed acknowledgement.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = self._loop.create_task(self._connect(sock))
            self._handshakes.add(task)
            task.add_done_callback(self._connected)
            self._note_open()

    def _connected(self, task: asyncio.Task[None]) -> None:
        self._handshakes.discard(task)
        self._note_open()

    def _note_open(self) -> None:
        """Note how many connections are open, for the process that accepts them if that is another one."""
        if self._counts is not None:
            self._counts.open = self.connections

    def _resume(self, listener: Listener) -> None:
        if listener in self._listeners:
            self._loop.add_reader(listener, self._accept, listener)

    async def _connect(self, sock: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._new_connection, sock, **self._tls())
        except (OSError, ssl.SSLError, TimeoutError) as error:
            logger.debug("an HTTP connection could not be set up: %s", error)
            sock.close()

    def _tls(self) -> dict[str, Any]:
        if self._certificates is None:
            return {}
        return {"ssl": self._certificates.current().http_context, "ssl_handshake_timeout": HANDSHAKE_SECONDS}

    def _new_connection(self) -> Any:
        return self._connection(config=self._config, server_state=self._state, app_state={}, _loop=self._loop)

    def drain(self) -> None:
        """Accept no more connections, and ask the clients of those that are open to connect elsewhere."""
        self._application.draining = True
        self._close_listeners()

    async def stop(self, seconds: float) -> None:
        """Give the requests under way `seconds` to finish, then close every connection."""
        self.drain()
        for connection in list(self._state.connections):
            connection.shutdown()
        tasks = {*self._state.tasks, *self._handshakes}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=seconds)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=0.5)
        for connection in list(self._state.connections):
            with contextlib.suppress(RuntimeError):
                connection.transport.abort()

    def _close_listeners(self) -> None:
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            self._loop.remove_reader(listener)
            addresses.close(listener)
