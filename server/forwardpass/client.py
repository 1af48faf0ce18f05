"""Client and AsyncClient: numpy in, numpy out, over one gRPC channel each. What is said on it is in `calls`.

The two have the same operations with the same arguments and differ only in how a call is made: `Client` blocks and may
be shared by threads; `AsyncClient` belongs to one event loop. Neither needs torch or onnxruntime.

    with Client("127.0.0.1:8001") as client:
        z = client.predict("digits", x)                      # one input, one output: [B, 64] or [64]
        answer = client.infer("ranker", {"user": u, "item": v}, timeout=0.05)
        answer["score"], answer.version
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Self

import grpc
import grpc.aio
from numpy.typing import ArrayLike, NDArray

from forwardpass.answers import Answer, ModelInfo, ModelState, Parameter, ServerInfo, Timings
from forwardpass.call_errors import (
    AlreadyExists,
    CallError,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    from_status,
)
from forwardpass.calls import Call, Calls, Inputs, Reply, Steps, T
from forwardpass.serving.protocol import INFERENCE_SERVICE
from forwardpass.tensors import TensorInfo

__all__ = [
    "AlreadyExists", "Answer", "AsyncClient", "CallError", "Cancelled", "Client", "DeadlineExceeded",
    "FailedPrecondition", "Internal", "InvalidArgument", "ModelInfo", "ModelState", "NotFound", "PermissionDenied",
    "ResourceExhausted", "ServerInfo", "TensorInfo", "Timings", "Unauthenticated", "Unavailable", "Unimplemented",
]  # fmt: skip

DEFAULT_ADDRESS: Final = "127.0.0.1:8001"
_MIB = 1 << 20
# What asks whether somebody is there should say so at once.
_NOT_RETRIED = ("ServerLive", "ServerReady", "ModelReady")


class _Connection:
    """Where a client calls, and how: what the two have in common but their operations."""

    _open: Callable[..., Any]  # makes a channel

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: float | None = 30.0,
        max_message_bytes: int = 64 * _MIB,
        keepalive: float = 60.0,
        attempts: int = 4,
        health_check: bool = True,
        options: Iterable[tuple[str, Any]] = (),
    ) -> None:
        """Does not touch the network; the first call connects.

        - `address`: any gRPC target: "host:port", "unix:/path"; "dns:///service.namespace:8001" or
          "ipv4:10.0.0.1:8001,10.0.0.2:8001", of which every address is called in turn.
        - `timeout`: seconds a call may take where the call does not say itself; None or inf: as long as it takes.
        - `max_message_bytes`: the largest message sent or received.
        - `keepalive`: seconds of silence in a call after which the server is asked whether it is still there; 0: never.
        - `attempts`: how often a call is made in all, 1 to 5, with growing pauses, while the answer is UNAVAILABLE.
        - `health_check`: leave out servers whose grpc.health.v1 says that they do not serve; one that has no such
          service counts as serving. Without it, calls reach a server that is still loading or already draining.
        - `options`: gRPC channel arguments, (name, value); they come before those made from the above.
        """
        if not 1 <= attempts <= 5:
            raise ValueError(f"attempts: expected 1 to 5, got {attempts}")
        self.address = address
        self._calls = Calls(timeout)
        arguments: dict[str, Any] = {
            "grpc.max_send_message_length": max_message_bytes,
            "grpc.max_receive_message_length": max_message_bytes,
            # The defaults wait a second before the first new attempt, and up to two minutes later on.
            "grpc.initial_reconnect_backoff_ms": 100,
            "grpc.max_reconnect_backoff_ms": 5000,
            "grpc.service_config": json.dumps(_service_config(attempts, health_check)),
        }
        if keepalive:
            arguments["grpc.keepalive_time_ms"] = int(keepalive * 1000)
        scheme, _, rest = address.partition(":")
        if scheme in ("ipv4", "ipv6"):
            # Of a list of addresses gRPC would make an authority with commas in it, which strict servers refuse.
            arguments["grpc.default_authority"] = rest.lstrip("/").partition(",")[0]
        self._arguments = tuple((arguments | dict(options)).items())
        self._channel: Any = None
        self._closed = False
        self._methods: dict[str, Any] = {}  # by path: what makes such calls
        self._opening = threading.Lock()

    def _method(self, path: str) -> Any:
        """What calls `path`. Opens the channel: an asyncio one takes the loop that runs when it is made."""
        with self._opening:
            if self._closed:
                raise ValueError("the client is closed")
            if self._channel is None:
                self._channel = self._open(self.address, options=self._arguments)
            return self._methods.setdefault(path, self._channel.unary_unary(path))

    def _end(self) -> Any:
        """The channel to close, if there is one. What is called from now on is a ValueError."""
        with self._opening:
            self._closed = True
            self._methods.clear()
            return self._channel

    def _failure(self, error: Any, timeout: float | None) -> CallError:
        """A grpc.RpcError of either kind of channel, as one of ours."""
        return from_status(
            error.code().value[0],
            error.details() or "",
            error.trailing_metadata() or (),
            address=self.address,
            timeout=timeout,
        )


def _service_config(attempts: int, health_check: bool) -> dict[str, Any]:
    retried: dict[str, Any] = {"name": [{"service": INFERENCE_SERVICE}]}
    if attempts > 1:
        retried["retryPolicy"] = {
            "maxAttempts": attempts,
            "initialBackoff": "0.05s",
            "maxBackoff": "1s",
            "backoffMultiplier": 3,
            "retryableStatusCodes": ["UNAVAILABLE"],
        }
    config: dict[str, Any] = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            retried,
            {"name": [{"service": INFERENCE_SERVICE, "method": method} for method in _NOT_RETRIED]},
        ],
    }
    if health_check:
        config["healthCheckConfig"] = {"serviceName": ""}
    return config


class Client(_Connection):
    """Calls a server and waits for the answer. Any number of threads may use one client at a time.

    Every operation raises a CallError, of the class that `call_errors` gives to its status; `timeout` is in seconds,
    None for the client's own.
    """

    _open = staticmethod(grpc.insecure_channel)

    def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = "",
        outputs: Iterable[str] | None = None,
        id: str = "",
        timeout: float | None = None,
        priority: int = 0,
        parameters: Mapping[str, Parameter] | None = None,
        timings: bool = False,
    ) -> Answer:
        """Send arrays [B, ...] by input name, or one array for a model with one input; get the outputs by name.

        Arrays are converted to the model's dtypes where no value changes but by a float's rounding: float64 is fine
        for FP32, integers where they come through exactly; anything else is InvalidArgument, and nothing is sent.
        BYTES takes and gives arrays of str (bytes, where they are no UTF-8), BF16 its bits as uint16.

        `version` "" is the server's choice; `outputs` None are all that the model gives unasked; `id` comes back in the
        answer; `priority` 1 is the most urgent, 0 the model's default; `parameters` go along as they are; `timings`
        asks the server where the time went.
        """
        return self._run(
            self._calls.infer(
                model,
                inputs,
                version=version,
                outputs=outputs,
                id=id,
                timeout=timeout,
                priority=priority,
                parameters=parameters,
                timings=timings,
            )
        )

    def predict(
        self,
        model: str,
        x: ArrayLike,
        *,
        output: str | None = None,
        version: str = "",
        timeout: float | None = None,
        priority: int = 0,
    ) -> NDArray[Any]:
        """The one output of a model with one input: [B, D_in] to [B, D_out]. A row [D_in] gives a row [D_out].

        `output` names one where the model has several.
        """
        return self._run(
            self._calls.predict(model, x, output=output, version=version, timeout=timeout, priority=priority)
        )

    def metadata(self, model: str, *, version: str = "", timeout: float | None = None) -> ModelInfo:
        """What a model takes and gives, asked anew."""
        return self._run(self._calls.metadata(model, version=version, timeout=timeout))

    def models(self, *, ready: bool = False, timeout: float | None = None) -> list[ModelState]:
        """Every model of the server's repository; with `ready`, those that serve."""
        return self._run(self._calls.models(ready=ready, timeout=timeout))

    def server(self, *, timeout: float | None = None) -> ServerInfo:
        """The server's name and version, and the extensions of the protocol that it offers."""
        return self._run(self._calls.server(timeout=timeout))

    def live(self, *, timeout: float | None = None) -> bool:
        """Whether somebody answers. False, not an error, where nobody does (or, with `health_check`, none serves)."""
        return self._run(self._calls.live(timeout=timeout))

    def ready(self, model: str | None = None, *, version: str = "", timeout: float | None = None) -> bool:
        """Whether the server, or one model, answers requests now. False, not an error, where nobody is there."""
        return self._run(self._calls.ready(model, version=version, timeout=timeout))

    def close(self) -> None:
        """End the connection. Calls in flight end with Cancelled; later ones are a ValueError."""
        channel = self._end()
        if channel is not None:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        try:
            call = next(steps)
            while True:
                try:
                    reply = self._make(call)
                except CallError as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(reply)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _make(self, call: Call) -> Reply:
        method = self._methods.get(call.path) or self._method(call.path)
        try:
            message, done = method.with_call(call.request, timeout=call.timeout, metadata=call.metadata)
        except grpc.RpcError as error:
            raise self._failure(error, call.timeout) from None
        return Reply(message, done.trailing_metadata() if call.metadata else ())


class AsyncClient(_Connection):
    """As Client, operation for operation, for asyncio: every operation is awaited.

    Belongs to the event loop in which it is first used; any number of its tasks may use it at a time.
    """

    _open = staticmethod(grpc.aio.insecure_channel)

    async def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = "",
        outputs: Iterable[str] | None = None,
        id: str = "",
        timeout: float | None = None,
        priority: int = 0,
        parameters: Mapping[str, Parameter] | None = None,
        timings: bool = False,
    ) -> Answer:
        """See `Client.infer`. A task that is cancelled cancels its call."""
        return await self._run(
            self._calls.infer(
                model,
                inputs,
                version=version,
                outputs=outputs,
                id=id,
                timeout=timeout,
                priority=priority,
                parameters=parameters,
                timings=timings,
            )
        )

    async def predict(
        self,
        model: str,
        x: ArrayLike,
        *,
        output: str | None = None,
        version: str = "",
        timeout: float | None = None,
        priority: int = 0,
    ) -> NDArray[Any]:
        """See `Client.predict`."""
        return await self._run(
            self._calls.predict(model, x, output=output, version=version, timeout=timeout, priority=priority)
        )

    async def metadata(self, model: str, *, version: str = "", timeout: float | None = None) -> ModelInfo:
        """See `Client.metadata`."""
        return await self._run(self._calls.metadata(model, version=version, timeout=timeout))

    async def models(self, *, ready: bool = False, timeout: float | None = None) -> list[ModelState]:
        """See `Client.models`."""
        return await self._run(self._calls.models(ready=ready, timeout=timeout))

    async def server(self, *, timeout: float | None = None) -> ServerInfo:
        """See `Client.server`."""
        return await self._run(self._calls.server(timeout=timeout))

    async def live(self, *, timeout: float | None = None) -> bool:
        """See `Client.live`."""
        return await self._run(self._calls.live(timeout=timeout))

    async def ready(self, model: str | None = None, *, version: str = "", timeout: float | None = None) -> bool:
        """See `Client.ready`."""
        return await self._run(self._calls.ready(model, version=version, timeout=timeout))

    async def close(self) -> None:
        """End the connection. Calls in flight end with Cancelled; later ones are a ValueError."""
        channel = self._end()
        if channel is not None:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        try:
            call = next(steps)
            while True:
                try:
                    reply = await self._make(call)
                except CallError as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(reply)
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _make(self, call: Call) -> Reply:
        method = self._methods.get(call.path) or self._method(call.path)
        doing = method(call.request, timeout=call.timeout, metadata=call.metadata)
        try:
            message = await doing
            return Reply(message, await doing.trailing_metadata() if call.metadata else ())
        except grpc.aio.AioRpcError as error:
            raise self._failure(error, call.timeout) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                doing.cancel()
                raise
            # Nobody cancelled this task: the channel was closed under the call.
            raise Cancelled("the client was closed") from None
