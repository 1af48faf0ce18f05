"""The ASGI application of the HTTP port: routes to handlers, and errors to responses.

Every RPC goes to the handler that gRPC's transports call, with the request's headers as its metadata: tokens,
admission, the queue and its deadlines are the same. A deadline comes by X-Request-Timeout, in seconds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from forwardpass import protocol
from forwardpass.errors import (
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    Reason,
    RequestError,
    RunFailed,
    Status,
    UnknownMethod,
)
from forwardpass.observability.log_limit import LogLimit
from forwardpass.protocol import json_inference, json_tensors
from forwardpass.protocol.json_inference import LENGTH_HEADER, Body
from forwardpass.transport.interface import Handlers, Metadata
from forwardpass.transport.memory_budget import MemoryBudget, Share
from forwardpass.transport.rest import bodies, v1
from forwardpass.transport.rest.bodies import ELSEWHERE, BodyBudget, BodyThread
from forwardpass.transport.rest.call_context import RestCallContext, deadline_of, metadata_of
from forwardpass.transport.rest.endpoints import ENDPOINTS, SPECIALS, Endpoint
from forwardpass.transport.rest.hang_up import HangUp
from forwardpass.transport.rest.openapi import description
from forwardpass.transport.rest.responses import BINARY, JSON, error_response, headers_of, json_response

logger = logging.getLogger(__name__)
logger.addFilter(LogLimit())

P = ParamSpec("P")
T = TypeVar("T")

_HANG_UP = "forwardpass.hang_up"  # where a request's HangUp is in its scope


@dataclass(frozen=True, slots=True)
class RestLimits:
    """Bounds of the HTTP port, in bytes."""

    max_message_bytes: int  # of one body, as it is received and inflated
    max_bytes: int  # of all bodies that are being received, parsed or sent


class RestApplication:
    """Used on the event loop."""

    def __init__(
        self,
        handlers: Handlers,
        limits: RestLimits,
        mounted: Callable[[Request], Awaitable[Response | None]] | None = None,
        flight: Callable[[Metadata], Awaitable[bytes]] | None = None,
    ) -> None:
        """`mounted` answers what is no path of the protocol, such as the status page's; None: nor one of its own.

        `flight` returns the flight recorder's dump as JSON, or raises RequestError.
        """
        self._rpcs = handlers[protocol.INFERENCE_SERVICE]
        self._health = handlers[protocol.HEALTH_SERVICE]["Check"]
        self._limits = limits
        self.budget = BodyBudget(limits.max_bytes)
        self._memory = MemoryBudget(limits.max_bytes)  # of answers, until they are made bodies
        self._thread = BodyThread()
        self._mounted = mounted
        self._flight = flight
        self._openapi = description()
        self.draining = False  # every response asks its client to connect anew
        functions = {
            "live": self._live, "ready": self._ready, "model_ready": self._model_ready, "infer": self._infer,
            "v1_models": self._v1_models, "v1_model": self._v1_model, "predict": self._predict,
            "alive": self._alive, "explain": self._explain, "describe": self._describe,
            "flight": self._dump,
        }  # fmt: skip
        # The first that matches is taken, so `{model}:predict` must come before `{model}`; and those that matter most
        # for speed before the others.
        specials = sorted(SPECIALS, key=lambda row: (row.name not in ("infer", "predict"), row.name == "v1_model"))
        routes = [Route(row.path, functions[row.name], methods=[row.method]) for row in specials]
        routes += [Route(e.path, self._plain(e), methods=[e.method]) for e in ENDPOINTS]
        self._router = Router(routes, redirect_slashes=False, default=self._otherwise)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        scope["app"] = self  # starlette then raises HTTPException for a wrong method

        async def send_on(message: Any) -> None:
            if message["type"] == "http.response.start" and (self.draining or bodies.LAST in scope):
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        hang_up = scope[_HANG_UP] = HangUp(receive)
        try:
            await self._router(scope, hang_up.receive, send_on)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            if not hang_up.happened:
                await self._fail(Draining("the server is stopping; send this to another one"), scope, send_on)
        except bodies.ClientDisconnect:
            pass
        except RequestError as error:
            await self._fail(error, scope, send_on, not (hang_up.whole or scope.get(bodies.WHOLE)))
        except HTTPException as error:
            response = json_response({"error": f"{scope['method']} is not offered here"}, error.status_code)
            response.headers.update(error.headers or {})
            await response(scope, receive, send_on)
        except Exception:
            logger.exception("an HTTP request failed unexpectedly")
            await self._fail(RunFailed("internal error; the server's log has the details"), scope, send_on, True)

    async def _fail(self, error: RequestError, scope: Scope, send: Send, close: bool = False) -> None:
        """Respond with an error. `close`: what is left of the request's body must not be read."""
        response = error_response(error)
        if close:
            response.headers["connection"] = "close"
        await response(scope, _nothing_more, send)

    # -- one RPC ------------------------------------------------------------------------------------------------------

    async def _call(self, rpc: str, message: bytes, request: Request) -> tuple[bytes, dict[str, str]]:
        """Call an RPC's handler. Returns its response message, and what must be added to the response's headers."""
        handler = self._health if rpc == "Check" else self._rpcs[rpc]
        headers = request.scope["headers"]
        deadline = deadline_of(headers)
        context = RestCallContext(headers, deadline, message, Share(self._memory))
        hang_up: HangUp = request.scope[_HANG_UP]
        with hang_up:
            if deadline is None:
                answer = await handler.function(context)
            else:
                limit = asyncio.timeout(context.seconds_left)
                try:
                    async with limit:
                        answer = await handler.function(context)
                except TimeoutError:
                    raise DeadlineExceeded("the deadline passed") from None
        assert answer is not None  # only handlers with streams return None
        return answer, headers_of(context.trailers)

    def _plain(self, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        kind = protocol.METHODS[endpoint.rpc].response

        async def respond(request: Request) -> Response:
            def parse(body: bytes) -> bytes:
                given = json_tensors.loads(body) if body.strip() else {}
                if not isinstance(given, dict):
                    raise InvalidRequest("the body: expected a JSON object")
                message: bytes = endpoint.request(request.path_params, given).SerializeToString()
                return message

            if endpoint.method == "POST":
                async with self._received(request) as body:
                    message = await self._work(len(body), parse, body)
            else:
                message = parse(b"")
            answer, _ = await self._call(endpoint.rpc, message, request)
            return json_response(endpoint.response(kind.FromString(answer)))

        return respond

    def _received(self, request: Request) -> AbstractAsyncContextManager[bytes]:
        return bodies.received(request, self._limits.max_message_bytes, self.budget, self._thread)

    async def _work(self, nbytes: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do work on so many bytes here, or on another thread if they are many."""
        if nbytes < ELSEWHERE:
            return work(*args, **kwargs)
        return await self._thread.run(work, *args, **kwargs)

    # -- inference ----------------------------------------------------------------------------------------------------

    async def _infer(self, request: Request) -> Response:
        path = request.path_params
        model, version = path["model"], path.get("version", "")
        async with self._received(request) as body:
            length = _header_length(request)
            if length == 0:
                message, forms = json_inference.raw_request(body, await self._metadata(request))
            else:
                parse = json_inference.parse_request
                message, forms = await self._work(len(body), parse, body, length, model, version)
        del body
        answer, headers = await self._call("ModelInfer", message, request)
        with self.budget.held_for(len(answer)):
            written = await self._work(len(answer), json_inference.write_response, answer, forms)
            del answer
            return await self._respond(written, headers, request)

    async def _predict(self, request: Request) -> Response:
        metadata = await self._metadata(request)
        version = request.path_params.get("version", "")

        def parse(body: bytes) -> tuple[bytes, bool]:
            return v1.predict_request(json_tensors.loads(body), metadata, version)

        async with self._received(request) as body:
            message, by_rows = await self._work(len(body), parse, body)
        del body
        answer, headers = await self._call("ModelInfer", message, request)
        with self.budget.held_for(len(answer)):
            content = await self._work(len(answer), v1.predict_response, answer, by_rows)
            del answer
            return await self._respond(Body(content, None), headers, request)

    async def _respond(self, body: Body, headers: dict[str, str], request: Request) -> Response:
        content, encoding = await bodies.compressed(body.content, request.headers, self._thread)
        response = Response(content, media_type=JSON if body.header_length is None else BINARY)
        response.headers.update(headers)
        if body.header_length is not None:
            response.headers[LENGTH_HEADER] = str(body.header_length)
        if encoding:
            response.headers["content-encoding"] = encoding
            response.headers["vary"] = "accept-encoding"
        return response

    async def _metadata(self, request: Request) -> Any:
        path = request.path_params
        asked = protocol.ModelMetadataRequest(name=path["model"], version=path.get("version", ""))
        answer, _ = await self._call("ModelMetadata", asked.SerializeToString(), request)
        return protocol.ModelMetadataResponse.FromString(answer)

    # -- readiness ----------------------------------------------------------------------------------------------------

    async def _live(self, _request: Request) -> Response:
        return json_response({"live": True})

    async def _ready(self, request: Request) -> Response:
        answer, _ = await self._call("Check", b"", request)
        ready = protocol.HealthCheckResponse.FromString(answer).status == 1  # SERVING
        return json_response({"ready": ready}, 200 if ready else 503)

    async def _model_ready(self, request: Request) -> Response:
        path = request.path_params
        asked = protocol.ModelReadyRequest(name=path["model"], version=path.get("version", ""))
        answer, _ = await self._call("ModelReady", asked.SerializeToString(), request)
        ready = protocol.ModelReadyResponse.FromString(answer).ready
        return json_response({"name": path["model"], "ready": ready}, 200 if ready else 503)

    async def _v1_models(self, request: Request) -> Response:
        index = protocol.RepositoryIndexRequest(ready=True).SerializeToString()
        answer, _ = await self._call("RepositoryIndex", index, request)
        models = protocol.RepositoryIndexResponse.FromString(answer).models
        return json_response({"models": sorted({model.name for model in models})})

    async def _v1_model(self, request: Request) -> Response:
        name = request.path_params["model"]
        asked = protocol.ModelReadyRequest(name=name)
        answer, _ = await self._call("ModelReady", asked.SerializeToString(), request)
        ready = protocol.ModelReadyResponse.FromString(answer).ready
        versions = (await self._metadata(request)).versions if ready else ()
        status = [
            {"version": version, "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
            for version in versions
        ]
        return json_response({"name": name, "ready": ready, "model_version_status": status}, 200 if ready else 503)

    async def _alive(self, request: Request) -> Response:
        """KServe's clients ask for the root whether a server lives; browsers get what is mounted there."""
        if self._mounted is not None and "text/html" in request.headers.get("accept", ""):
            response = await self._mounted(request)
            if response is not None:
                response.headers["vary"] = "accept"
                return response
        return json_response({"status": "alive"})

    # -- the rest -----------------------------------------------------------------------------------------------------

    async def _dump(self, request: Request) -> Response:
        if self._flight is None:
            raise UnknownMethod("there is no flight recorder")
        content = await self._flight(metadata_of(request.scope["headers"]))
        return Response(content, media_type=JSON)

    async def _describe(self, _request: Request) -> Response:
        return Response(self._openapi, media_type=JSON)

    async def _explain(self, _request: Request) -> Response:
        raise UnknownMethod("explanations are not offered")

    async def _otherwise(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._mounted is not None and not scope["path"].startswith(("/v1/", "/v2/")):
            response = await self._mounted(Request(scope, receive))
            if response is not None:
                await response(scope, receive, send)
                return
        raise UnknownPath(f"there is no {scope['path'][:200]!r} here; /openapi.json lists what there is")


class UnknownPath(RequestError):
    """No such path."""

    status, reason = Status.NOT_FOUND, Reason.UNKNOWN_METHOD


async def _nothing_more() -> Any:
    raise AssertionError("a response reads nothing")


def _header_length(request: Request) -> int | None:
    text = request.headers.get(LENGTH_HEADER)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise InvalidRequest(f"Inference-Header-Content-Length: expected a number of bytes, got '{text[:40]}'")
    return int(text)
