"""One connection of the HTTP port: uvicorn's HTTP/1.1, with bounds that it has not.

- A head must be complete within HEAD_SECONDS of its first byte (or of the connection) and within `max_head_bytes`; so
  must the next one, where something came that is no request.
- A client that takes nothing of a response for WRITE_SECONDS is cut off; until then what it has not taken is counted.
- Of requests that are sent without waiting for responses, few are parsed ahead; the others stay bytes, within one read.
"""

from __future__ import annotations

import asyncio
import http
import sys
from collections.abc import Callable
from typing import Any, Final, cast

import httptools
import orjson
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from forwardpass.transport.rest.bodies import LAST, WHOLE, BodyBudget

HEAD_SECONDS: Final = 10.0
WRITE_SECONDS: Final = 30.0
SLICE: Final = 4096  # bytes that are parsed before what waits for its turn is looked at


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


class HeldFlow(FlowControl):
    """uvicorn's flow control, which reads no further while it is held, whatever uvicorn resumes."""

    held = False

    def hold(self) -> None:
        self.held = True
        self.pause_reading()

    def release(self) -> None:
        self.held = False
        self.resume_reading()

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class RestConnection(HttpToolsProtocol):
    """uvicorn's connection, with timers and a bound for the parts of a request and response that it leaves open."""

    max_head_bytes = 16384
    budget: BodyBudget
    closed: Callable[[], None] = staticmethod(lambda: None)  # called once it is not among the open ones any more

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow: HeldFlow = HeldFlow(transport)
        self._ahead = b""  # came while requests waited for their turn
        self._feeding = b""  # is being parsed
        self._goes_on = False  # the head of the request whose upgrade is ignored is parsed again
        self._unsent = 0  # bytes of responses that the client has not taken, as they were counted
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._in_head = False
        self._heads = 0  # that began
        self._parsed = 0  # bytes of the head that were parsed
        self._received = 0  # bytes that came since it began, without completing it
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_seen()
        self.resume_writing()
        super().connection_lost(exc)
        self.closed()

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), SLICE):
            if self.transport.is_closing():
                return  # after an error that ended the connection
            if self.flow.held:
                self._ahead += data[start:]
                return
            self._feed(data[start : start + SLICE] if len(data) > SLICE else data)
            if self.pipeline:
                self.flow.hold()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.flow.held and not self.pipeline and not self.transport.is_closing():
            ahead, self._ahead = self._ahead, b""
            self.flow.release()
            self.data_received(ahead)

    def _feed(self, data: bytes) -> None:
        self._feeding = data
        of = self._heads if self._in_head else None
        super().data_received(data)
        # The parser keeps a name or value that is not complete. What ends a head is not counted: a body may follow.
        if self._in_head and of == self._heads:
            self._received += len(data)
            if self._received > self.max_head_bytes and not self.transport.is_closing():
                self._refuse(431, f"the request's head has more than {self.max_head_bytes} bytes, the limit")
                return
        # Most heads come whole, and need no timer. What is no request, such as an empty line or the rest of a body that
        # was not asked for, has ended the wait of an idle connection, and must not keep it.
        idle = self.cycle is None or self.cycle.response_complete
        if (self._in_head or idle) and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self._await_head()

    def _unsupported_upgrade_warning(self) -> None:
        """Go on without an upgrade (to h2c, which Java's client asks for with every first request).

        The parser has ended with the head, though a body may follow: another one goes on behind the same head without
        its upgrade.
        """
        ended = sys.exception()
        assert isinstance(ended, httptools.HttpParserUpgrade)
        rest = self._feeding[ended.args[0] :]
        framing = [b"%s: %s" % h for h in self.headers if h[0] in (b"content-length", b"transfer-encoding")]
        self.parser = httptools.HttpRequestParser(self)
        self._goes_on = True
        self.parser.feed_data(b"\r\n".join((b"POST / HTTP/1.1", *framing, b"", b"")))
        if rest:
            self._feed(rest)

    def on_message_begin(self) -> None:
        if self._goes_on:
            return
        super().on_message_begin()
        self._in_head = True
        self._heads += 1
        self._parsed = self._received = 0

    def on_url(self, url: bytes) -> None:
        if self._goes_on:
            return
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._goes_on:
            return
        self._count(len(name) + len(value))
        if self._in_head:  # else it follows a body: what no proxy has checked must not become a header
            super().on_header(name, value)

    def _count(self, nbytes: int) -> None:
        self._parsed += nbytes
        if self._parsed > self.max_head_bytes:
            raise HeadTooLarge  # ends the parser, and uvicorn calls `send_400_response`

    def on_headers_complete(self) -> None:
        if self._goes_on:
            self._goes_on = False
            return
        self._in_head = False
        self._head_seen()
        super().on_headers_complete()
        if self.scope["method"] != "HEAD":  # whose response has no body to join
            self.cycle.transport = cast("asyncio.Transport", JoinedHead(self.transport, self.cycle))

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # see `_unsupported_upgrade_warning`
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
        if self.flow.held:  # the rest of it was not read yet
            self._await_head()
        elif self._in_head:
            self._refuse(408, f"the request's head did not arrive within {HEAD_SECONDS:g} s")
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        if self._parsed > self.max_head_bytes:
            self._refuse(431, f"the request's head has more than {self.max_head_bytes} bytes, the limit")
        else:
            self._refuse(400, f"expected a request of HTTP/1.1: {msg}")

    def _refuse(self, status: int, text: str) -> None:
        """Respond with an error, unless a response is being written, and close the connection.

        Requests that came whole before are answered first, and the connection is closed without the error.
        """
        cycle = self.cycle
        idle = cycle is None or cycle.response_complete
        if not idle and cast("dict[str, Any]", cycle.scope).get(WHOLE):
            cycle.keep_alive = False
            cast("dict[str, Any]", cycle.scope)[LAST] = True
            self._ahead = b""
            self.flow.hold()
            return
        if not idle and not cycle.response_started and not self.pipeline:
            cycle.disconnected = idle = True
            cycle.message_event.set()
        if idle:
            body = orjson.dumps({"error": text})
            lines = (
                f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", "content-type: application/json",
                f"content-length: {len(body)}", "connection: close", "", "",
            )  # fmt: skip
            self.transport.write("\r\n".join(lines).encode() + body)
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self.transport.get_write_buffer_size()
        self.budget.count(self._unsent)
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.budget.give_back(self._unsent)
        self._unsent = 0
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # closing would wait for a client that reads nothing
        else:
            super().timeout_keep_alive_handler()
