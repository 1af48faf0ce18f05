"""Bodies of HTTP messages: received within bounds of size, time and memory; inflated and deflated.

What a request declares is checked before anything is read. Bodies over 64 KiB are inflated on another thread, so that
they do not hold up the calls of others.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping
from typing import Final

from starlette.requests import ClientDisconnect, Request

from forwardpass.errors import InvalidRequest, Overloaded, Reason, TooLarge, printable

BODY_SECONDS: Final = 30.0  # within which a whole body must have arrived
WHOLE: Final = "forwardpass.whole"  # in the scope of a request that was received to its end
ELSEWHERE: Final = 64 << 10  # bytes from which work on a body is done on another thread
SMALLEST_DEFLATED: Final = 1024  # bytes of a response that is worth compressing
_LEVEL: Final = 1  # of zlib: on a fast network, more costs more time than it saves
_WINDOW: Final = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # by content coding


class UnknownEncoding(InvalidRequest):
    """The body has a content coding that is not known here."""


class BodyBudget:
    """Bytes of bodies that are in memory, over all connections. Used on the event loop."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.held = 0

    def take(self, nbytes: int) -> None:
        """Count more bytes. Raises Overloaded if there are too many."""
        if self.held + nbytes > self._most:
            raise Overloaded(
                f"{self.held} bytes of bodies are being received, the bound is {self._most}",
                reason=Reason.SERVER_BYTES,
                retry_after=1.0,
            )
        self.held += nbytes

    def give_back(self, nbytes: int) -> None:
        self.held -= nbytes


async def read(request: Request, most: int, budget: BodyBudget) -> bytes:
    """A request's body, inflated. Its bytes stay counted in `budget` only while they arrive.

    Raises TooLarge beyond `most` bytes, on the wire or inflated; Overloaded if others' bodies fill the budget;
    InvalidRequest if it does not arrive in time, or is not what its content coding says; ClientDisconnect.
    """
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
        async with asyncio.timeout(None if request.scope.get(WHOLE) else BODY_SECONDS):
            async for chunk in request.stream():
                budget.take(len(chunk))
                held += len(chunk)
                if held > most:
                    raise TooLarge(f"the body has more than {most} bytes, the limit")
                chunks.append(chunk)
    except TimeoutError:
        raise InvalidRequest(f"the body did not arrive within {BODY_SECONDS:g} s") from None
    finally:
        budget.give_back(held)
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    if encoding == "identity":
        return body
    if len(body) < ELSEWHERE:
        return inflated(body, encoding, most)
    return await asyncio.to_thread(inflated, body, encoding, most)


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


async def compressed(content: bytes, headers: Mapping[str, str]) -> tuple[bytes, str]:
    """A response's content in a coding that the request's headers accept, and that coding; "": as it is."""
    accepted = headers.get("accept-encoding", "")
    if not accepted or len(content) < SMALLEST_DEFLATED:
        return content, ""
    encoding = _accepted(accepted)
    if not encoding:
        return content, ""
    deflate = asyncio.to_thread(_deflated, content, encoding) if len(content) >= ELSEWHERE else None
    shorter = await deflate if deflate is not None else _deflated(content, encoding)
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


__all__ = ["WHOLE", "BodyBudget", "ClientDisconnect", "UnknownEncoding", "compressed", "inflated", "read"]
