"""The status page in front of a WSGI application, which gets what is none of the page's paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

from forwardpass.status.page import StatusPage

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def mounted(page: StatusPage, application: Application) -> Application:
    """A WSGI application with both. Streams are closed by the server, as WSGI has it, however they end."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        # WSGI's texts are bytes in latin-1's clothes.
        path = environ["PATH_INFO"].encode("latin-1").decode("utf-8", "replace")
        headers = {"authorization": environ["HTTP_AUTHORIZATION"]} if "HTTP_AUTHORIZATION" in environ else {}
        reply = page.respond(path, environ.get("QUERY_STRING", ""), headers, environ["REQUEST_METHOD"])
        if reply is None:
            return application(environ, start_response)
        start_response(f"{reply.status} {HTTPStatus(reply.status).phrase}", reply.headers)
        return [reply.body] if isinstance(reply.body, bytes) else reply.body

    return answer
