"""The status page for a starlette application: what it asks for paths that are none of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from forwardpass.status.page import EventStream, StatusPage


class EventResponse(StreamingResponse):
    """A stream of events, which is closed however the response ends."""

    def __init__(self, stream: EventStream, status: int, headers: dict[str, str]) -> None:
        super().__init__(stream, status, headers)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()


def responder(page: StatusPage) -> Callable[[Request], Awaitable[Response | None]]:
    """A function from request to response; None: the path is none of the page's."""

    async def respond(request: Request) -> Response | None:
        given = request.headers.getlist("authorization")
        headers = {"authorization": ", ".join(given)} if given else {}
        # On a thread: it may read a file, or wait for counters.
        reply = await asyncio.to_thread(page.respond, request.scope["path"], request.url.query, headers, request.method)
        if reply is None:
            return None
        said = dict(reply.headers)
        if isinstance(reply.body, EventStream):
            return EventResponse(reply.body, reply.status, said)
        return Response(reply.body, reply.status, said)

    return respond
