"""Bodies of HTTP messages: received within bounds of size, time and memory; inflated and deflated.

What a request declares is checked before anything is read. Work on large bodies is done on one thread beside the event
loop, one body at a time: it holds the interpreter for the most part, so that more threads would take memory and give
nothing, and a body of JSON takes many times its bytes while it is parsed.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, ParamSpec, TypeVar

from starlette.requests import ClientDisconnect, Request

from forwardpass.errors import InvalidRequest, Overloaded, PermissionDenied, Reason, RequestError, TooLarge, printable

BODY_SECONDS: Final = 30.0  # within which a whole body must have arrived
WHOLE: Final = "forwardpass.whole"  # in the scope of a request that was received to its end
LAST: Final = "forwardpass.last"  # in a request's scope: the connection ends with its response
ELSEWHERE: Final = 64 << 10  # bytes from which work on a body is done on another thread
_INFLATED_ELSEWHERE: Final = ELSEWHERE // 32  # bytes that may inflate to a thousand times as many
SMALLEST_DEFLATED: Final = 1024  # bytes of a response that is worth compressing
_LEVEL: Final = 1  # of zlib: on a fast network, more costs more time than it saves
_WINDOW: Final = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # by content coding


P = ParamSpec("P")
T = TypeVar("T")


class UnknownEncoding(InvalidRequest):
    """The body has a content coding that is not known here."""


class BodyBudget:
    """Bytes of bodies that are in memory, over all connections: of requests until they are parsed, of responses from
    when a client does not take them. Used on the event loop."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.held = 0

    def take(self, nbytes: int) -> None:
        """Count more bytes. Raises Overloaded if there are too many."""
        if self.held + nbytes > self._most:
            raise Overloaded(
                f"{self.held} bytes of bodies are being received or sent, the bound is {self._most}",
                reason=Reason.SERVER_BYTES,
                retry_after=1.0,
            )
        self.count(nbytes)

    @contextlib.contextmanager
    def held_for(self, nbytes: int) -> Iterator[None]:
        """Count an answer within the context. Raises as `take`, except for one alone, of any size."""
        (self.take if self.held else self.count)(nbytes)
        try:
            yield
        finally:
            self.give_back(nbytes)

    def count(self, nbytes: int) -> None:
        """Count what is there already."""
        self.held += nbytes

    def give_back(self, nbytes: int) -> None:
        self.held -= nbytes


class BodyThread:
    """One thread, on which work on large bodies waits for its turn."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="http-bodies")

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        def unburdened() -> T:
            try:
                return work(*args, **kwargs)
            except RequestError as error:
                # Its frames hold what was parsed, and its context the text, until the response was written.
                error.__context__ = None
                raise error.with_traceback(None)  # noqa: B904

        return await asyncio.get_running_loop().run_in_executor(self._executor, unburdened)


def _check_origin(request: Request) -> None:
    """Refuse what a page of another site has a browser send, which asks nobody where the body is plain text.

    Raises PermissionDenied. Programs that are no browsers send no Origin.
    """
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host", ""):
        raise PermissionDenied(
            f"expected a request of this site's own pages, got Origin '{printable(origin)}'; a proxy must keep the Host"
        )


@contextlib.asynccontextmanager
async def received(request: Request, most: int, budget: BodyBudget, thread: BodyThread) -> AsyncIterator[bytes]:
    """A request's body, inflated. Its bytes stay counted in `budget` within the context.

    Raises TooLarge beyond `most` bytes, on the wire or inflated; Overloaded if others' bodies fill the budget;
    InvalidRequest if it does not arrive in time, or is not what its content coding says; PermissionDenied if a page of
    another site sent it; ClientDisconnect.
    """
    _check_origin(request)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity" and encoding not in _WINDOW:
        raise UnknownEncoding(f"Content-Encoding: expected gzip, deflate or identity, got '{printable(encoding)}'")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise TooLarge(f"the body has {printable(declared, 20)} bytes, the limit is {most}")
    chunks: list[bytes] = []
    held = 0
    try:
        # A timer costs as much as reading a small body, and one that has arrived needs none.
        try:
            async with asyncio.timeout(None if request.scope.get(WHOLE) else BODY_SECONDS):
                async for chunk in request.stream():
                    budget.take(len(chunk))
                    held += len(chunk)
                    if held > most:
                        raise TooLarge(f"the body has more than {most} bytes, the limit")
                    chunks.append(chunk)
        except TimeoutError:
            raise InvalidRequest(f"the body did not arrive within {BODY_SECONDS:g} s") from None
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        if encoding != "identity":
            if len(body) < _INFLATED_ELSEWHERE:
                body = inflated(body, encoding, most)
            else:
                body = await thread.run(inflated, body, encoding, most)
            budget.take(len(body))
            held += len(body)
        yield body
    finally:
        budget.give_back(held)


def inflated(body: bytes, encoding: str, most: int) -> bytes:
    """A compressed body's content. Raises TooLarge beyond `most` bytes, InvalidRequest if it is not so compressed."""
    inflate = zlib.decompressobj(_WINDOW[encoding])
    try:
        content = inflate.decompress(body, most + 1)
    except zlib.error as error:
        if encoding == "deflate":  # some clients leave out zlib's header
            inflate = zlib.decompressobj(-15)
            try:
                content = inflate.decompress(body, most + 1)
            except zlib.error:
                raise InvalidRequest(f"the body is not {encoding}: {error}") from None
        else:
            raise InvalidRequest(f"the body is not {encoding}: {error}") from None
    if len(content) > most:
        raise TooLarge(f"the body has more than {most} bytes when it is inflated, the limit")
    if not inflate.eof or inflate.unused_data:
        raise InvalidRequest(
            f"the body is not {encoding}: it {'goes on after its end' if inflate.eof else 'is cut off'}"
        )
    return content


async def compressed(content: bytes, headers: Mapping[str, str], thread: BodyThread) -> tuple[bytes, str]:
    """A response's content in a coding that the request's headers accept, and that coding; "": as it is."""
    accepted = headers.get("accept-encoding", "")
    if not accepted or len(content) < SMALLEST_DEFLATED:
        return content, ""
    encoding = _accepted(accepted)
    if not encoding:
        return content, ""
    large = len(content) >= ELSEWHERE
    shorter = await thread.run(_deflated, content, encoding) if large else _deflated(content, encoding)
    return (shorter, encoding) if len(shorter) < len(content) else (content, "")


def _deflated(content: bytes, encoding: str) -> bytes:
    deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW[encoding])
    return deflate.compress(content) + deflate.flush()


def _accepted(header: str) -> str:
    """gzip or deflate, whichever an Accept-Encoding header names first without refusing it; "": neither."""
    for item in header.lower().split(","):
        coding, _, weight = item.strip().partition(";")
        if coding.strip() in ("gzip", "deflate") and weight.replace(" ", "").rstrip("0.") != "q=":
            return coding.strip()
    return ""


__all__ = [
    "LAST", "WHOLE", "BodyBudget", "BodyThread", "ClientDisconnect", "UnknownEncoding", "compressed", "inflated",
    "received",
]  # fmt: skip
