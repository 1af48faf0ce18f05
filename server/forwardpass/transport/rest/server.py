"""The HTTP port's connections: uvicorn's HTTP/1.1, with bounds that it has not, on the server's event loop.

- A head must be complete within HEAD_SECONDS of its first byte (or of the connection) and within `max_head_bytes`.
- A client that takes nothing of a response for WRITE_SECONDS is cut off; an idle connection is closed after
  IDLE_SECONDS.
- Connections are bounded; one that is accepted beyond the bound is closed at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
import socket
import ssl
from typing import Any, Final, cast

import orjson
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from forwardpass.observability.log_limit import LogLimit
from forwardpass.security.certificates import Certificates
from forwardpass.transport import addresses
from forwardpass.transport.listeners import ACCEPTS, ONE_CONNECTION, accepts
from forwardpass.transport.rest.application import RestApplication
from forwardpass.transport.rest.bodies import WHOLE

logger = logging.getLogger(__name__)
logger.addFilter(LogLimit())
logging.getLogger("uvicorn.error").addFilter(LogLimit())  # it has a line for every malformed request

HEAD_SECONDS: Final = 10.0
HANDSHAKE_SECONDS: Final = 10.0  # of TLS
WRITE_SECONDS: Final = 30.0
IDLE_SECONDS: Final = 75.0  # longer than load balancers keep a connection, so that they close it and not this end
PAUSE_SECONDS: Final = 1.0  # before connections are accepted again after a failure of the machine
MOST_CONNECTIONS: Final = 4096


class HeadTooLarge(Exception):
    """A request's head exceeds its bound."""


class JoinedHead:
    """One response's transport: its head, which uvicorn writes by itself, is held and goes with the body's first bytes.

    A write is a system call, and two cost more than most responses do elsewhere.
    """

    def __init__(self, transport: asyncio.Transport, cycle: RequestResponseCycle) -> None:
        self._transport, self._cycle = transport, cycle
        self._head: bytes | None = None
        self._joined = False

    def write(self, data: bytes) -> None:
        if self._joined or not self._cycle.response_started:
            self._transport.write(data)
        elif self._head is None:
            self._head = data
        else:
            self._flush(data)

    def _flush(self, data: bytes = b"") -> None:
        if self._head is not None and not self._joined:
            self._joined = True
            self._transport.write(self._head + data)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self._flush()
        self._transport.close()


class RestConnection(HttpToolsProtocol):
    """uvicorn's connection, with timers and a bound for the parts of a request and response that it leaves open."""

    max_head_bytes = 16384

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._in_head = False
        self._parsed = 0  # bytes of the head that were parsed
        self._received = 0  # bytes that came since it began, without completing it
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_seen()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return  # after an error that ended the connection
        if self._in_head:  # the parser keeps a name or value that is not complete
            self._received += len(data)
            if self._received > self.max_head_bytes:
                self._refuse(431, f"the request's head has more than {self.max_head_bytes} bytes, the limit")
                return
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():  # most heads come whole, and need no timer
            self._await_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._parsed = self._received = 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def _count(self, nbytes: int) -> None:
        self._parsed += nbytes
        if self._parsed > self.max_head_bytes:
            raise HeadTooLarge  # ends the parser, and uvicorn calls `send_400_response`

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_seen()
        super().on_headers_complete()
        if self.scope["method"] != "HEAD":  # whose response has no body to join
            self.cycle.transport = cast("asyncio.Transport", JoinedHead(self.transport, self.cycle))

    def on_message_complete(self) -> None:
        cast("dict[str, Any]", self.scope)[WHOLE] = True
        super().on_message_complete()

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _head_seen(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._in_head:
            self._refuse(408, f"the request's head did not arrive within {HEAD_SECONDS:g} s")
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        if self._parsed > self.max_head_bytes:
            self._refuse(431, f"the request's head has more than {self.max_head_bytes} bytes, the limit")
        else:
            self._refuse(400, f"expected a request of HTTP/1.1: {msg}")

    def _refuse(self, status: int, text: str) -> None:
        """Respond with an error, unless a response is being written, and close the connection."""
        if self.cycle is None or self.cycle.response_complete:
            body = orjson.dumps({"error": text})
            lines = (
                f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", "content-type: application/json",
                f"content-length: {len(body)}", "connection: close", "", "",
            )  # fmt: skip
            self.transport.write("\r\n".join(lines).encode() + body)
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # closing would wait for a client that reads nothing
        else:
            super().timeout_keep_alive_handler()


class RestServer:
    """Listeners and connections of the HTTP port. Used on the event loop."""

    def __init__(
        self, application: RestApplication, max_head_bytes: int, most_connections: int = MOST_CONNECTIONS
    ) -> None:
        self._application = application
        self._most = most_connections
        self._connection = type("BoundedConnection", (RestConnection,), {"max_head_bytes": max_head_bytes})
        # `loaded_app` is all that a connection takes from the configuration beside these.
        self._config = Config(
            application, http="httptools", ws="none", lifespan="off", interface="asgi3", log_config=None,
            access_log=False, proxy_headers=False, server_header=False, date_header=False,
            timeout_keep_alive=int(IDLE_SECONDS),
        )  # fmt: skip
        self._config.load()
        self._state = ServerState()
        self._listeners: list[socket.socket] = []
        self._certificates: Certificates | None = None
        self._handshakes: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()

    def listen(self, host: str, port: int, certificates: Certificates | None = None) -> int:
        """Bind. Returns the port. `certificates` None: plaintext. Raises OSError if binding fails."""
        self._certificates = certificates
        self._listeners = addresses.listen(host, port)
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

    def _accept(self, listener: socket.socket) -> None:
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
            task.add_done_callback(self._handshakes.discard)

    def _resume(self, listener: socket.socket) -> None:
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
