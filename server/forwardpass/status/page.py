"""The status page's answers, for any HTTP server: a path in; a status, headers and a body out. Opens no socket.

    /                                   the page, with its script and style: no secret, so no token
    /status/snapshot.json               all figures (`snapshot`)
    /status/events                      the same once a second, as server-sent events
    /status/models/M/V/graph.svg        the network's layers, drawn
    /status/models/M/V/sample.json      a row to try, ?row=N of the contract's samples

With tokens on, all but the page itself need one of the role infer, as `Authorization: Bearer TOKEN`. Streams are
bounded: one more viewer than MOST_VIEWERS gets 503, and the script then asks for the snapshot from time to time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs

from forwardpass.errors import ForwardpassError, RequestError, Status, UnknownModel
from forwardpass.inference.worker import Worker
from forwardpass.repository.model_version import ModelVersion
from forwardpass.repository.repository import Repository
from forwardpass.security.tokens import Role, Tokens
from forwardpass.status.drawing import draw
from forwardpass.status.sample import sample
from forwardpass.status.snapshot import StatusSource

MOST_VIEWERS = 16  # streams of events at a time; each takes a thread where the mounting server has one a request
EVERY = 1.0  # seconds between two events
STATIC = Path(__file__).parent / "static"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/status/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/status/format.js": ("format.js", "text/javascript; charset=utf-8"),
    "/status/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
    "/status/models.js": ("models.js", "text/javascript; charset=utf-8"),
    "/status/try.js": ("try.js", "text/javascript; charset=utf-8"),
    "/status/style.css": ("style.css", "text/css; charset=utf-8"),
    "/status/icon.svg": ("icon.svg", "image/svg+xml"),
}
POLICY = (
    "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
GUARDS = (
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
)


class StatusReply(NamedTuple):
    """One response. A body that is an EventStream must be iterated over and, in any case, closed."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes | EventStream


class StopSignal:
    """Whether the page has stopped: threads wait for it, and event loops are called."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._calls: set[Callable[[], None]] = set()
        self._lock = threading.Lock()

    def set(self) -> None:
        with self._lock:
            self._event.set()
            calls = [*self._calls]
        for call in calls:
            call()

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, seconds: float) -> None:
        self._event.wait(seconds)

    @contextlib.contextmanager
    def calling(self, call: Callable[[], None]) -> Iterator[None]:
        """Within it, `call` is called once the page stops; also if it has stopped already."""
        with self._lock:
            self._calls.add(call)
        if self._event.is_set():
            call()
        try:
            yield
        finally:
            with self._lock:
                self._calls.discard(call)


class EventStream:
    """Server-sent events, one in EVERY seconds, until the page stops or `allowed` says no. For one thread or task."""

    def __init__(self, document: Callable[[], bytes], stopped: StopSignal, allowed: Callable[[], bool]) -> None:
        self._document = document
        self._stopped = stopped
        self._allowed = allowed
        self.closed: Callable[[], None] = lambda: None  # called once
        self._lock = threading.Lock()
        self._is_closed = False

    def close(self) -> None:
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
        if not was_closed:
            self.closed()

    def _event(self) -> bytes:
        return b"data: " + self._document() + b"\n\n"

    def _goes_on(self) -> bool:
        return not self._stopped.is_set() and not self._is_closed and self._allowed()

    def __iter__(self) -> Iterator[bytes]:
        try:
            while self._goes_on():
                yield self._event()
                self._stopped.wait(EVERY)
        finally:
            self.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()

        def stop() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(stopped.set)

        with self._stopped.calling(stop):
            try:
                while self._goes_on():
                    yield await asyncio.to_thread(self._event)
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(stopped.wait(), EVERY)
            finally:
                self.close()


class StatusPage:
    """Answers requests for the page. Thread-safe; blocks for milliseconds at most, but for streams."""

    def __init__(self, source: StatusSource, repository: Repository, tokens: Tokens | None) -> None:
        self._source = source
        self._repository = repository
        self._tokens = tokens
        self._stopped = StopSignal()
        self._viewers = 0
        self._lock = threading.Lock()
        self._drawings: weakref.WeakKeyDictionary[Worker, bytes] = weakref.WeakKeyDictionary()

    def stop(self) -> None:
        """End every stream; later ones end at once."""
        self._stopped.set()

    def respond(self, path: str, query: str, headers: Mapping[str, str], method: str = "GET") -> StatusReply | None:
        """The response to a request; None: the path is none of this page's, and the server's own 404 applies.

        `path` is decoded; `headers` have names in lower case. HEAD gets an empty body.
        """
        shell = FILES.get(path)
        if shell is None and not path.startswith("/status/"):
            return None
        if method not in ("GET", "HEAD"):
            return _error(405, f"expected GET, got {method}", ("Allow", "GET, HEAD"))
        if shell is not None:
            reply = _file(*shell)
        elif (refusal := self._refusal(headers)) is not None:
            reply = _refused(refusal)
        else:
            found = self._data(path, query, headers)
            if found is None:
                return None
            reply = found
        if method == "HEAD":
            if isinstance(reply.body, EventStream):
                reply.body.close()
            reply = reply._replace(body=b"")
        return reply

    def _refusal(self, headers: Mapping[str, str]) -> RequestError | None:
        if self._tokens is None:
            return None
        given = headers.get("authorization")
        return self._tokens.refusal([] if given is None else [("authorization", given)], Role.INFER)

    def _data(self, path: str, query: str, headers: Mapping[str, str]) -> StatusReply | None:
        """What a token may be needed for."""
        if path == "/status/snapshot.json":
            return _reply("application/json", self._source.document())
        if path == "/status/events":
            return self._events(headers)
        parts = path.removeprefix("/status/models/").split("/")
        if not path.startswith("/status/models/") or len(parts) != 3 or parts[2] not in ("graph.svg", "sample.json"):
            return None
        try:
            entry = self._served(parts[0], parts[1])
            if parts[2] == "graph.svg":
                # A drawing has its style inside, which the page's own policy would not let it use.
                return _reply("image/svg+xml", self._drawing(entry), "default-src 'none'; style-src 'unsafe-inline'")
            assert entry.loaded is not None
            wanted = parse_qs(query).get("row", ["0"])[0]
            row = int(wanted) if wanted.isascii() and wanted.isdecimal() and len(wanted) < 10 else 0
            return _json(200, sample(entry.loaded, row))
        except ForwardpassError as error:
            return _error(404, str(error))

    def _events(self, headers: Mapping[str, str]) -> StatusReply:
        with self._lock:
            if self._viewers >= MOST_VIEWERS:
                return _error(503, f"{MOST_VIEWERS} viewers are being served; ask for /status/snapshot.json instead")
            self._viewers += 1
        stream = EventStream(self._source.document, self._stopped, lambda: self._refusal(headers) is None)
        stream.closed = self._left
        return StatusReply(200, [("Content-Type", "text/event-stream; charset=utf-8"), *GUARDS], stream)

    def _left(self) -> None:
        with self._lock:
            self._viewers -= 1

    def _served(self, name: str, version: str) -> ModelVersion:
        for entry in self._repository.entries():
            if (entry.name, entry.version) == (name, version) and entry.loaded is not None:
                return entry
        raise UnknownModel("no such version of a model is served")

    def _drawing(self, entry: ModelVersion) -> bytes:
        loaded = entry.loaded
        assert loaded is not None
        with self._lock:
            known = self._drawings.get(loaded.worker)
        if known is None:
            title = f"{entry.name}, version {entry.version}"
            known = draw(entry.folder / loaded.config.model_file, title).encode()
            with self._lock:
                self._drawings[loaded.worker] = known
        return known


def _reply(kind: str, body: bytes, policy: str = POLICY) -> StatusReply:
    headers = [("Content-Type", kind), ("Content-Length", str(len(body))), ("Content-Security-Policy", policy)]
    return StatusReply(200, [*headers, *GUARDS], body)


def _file(name: str, kind: str) -> StatusReply:
    return _reply(kind, (STATIC / name).read_bytes())


def _json(status: int, content: object, *more: tuple[str, str]) -> StatusReply:
    reply = _reply("application/json", json.dumps(content, allow_nan=False).encode())
    return reply._replace(status=status, headers=[*reply.headers, *more])


def _error(status: int, text: str, *more: tuple[str, str]) -> StatusReply:
    return _json(status, {"error": text}, *more)


def _refused(error: RequestError) -> StatusReply:
    if error.status is Status.UNAUTHENTICATED:
        return _error(401, str(error), ("WWW-Authenticate", "Bearer"))
    return _error(403, str(error))
