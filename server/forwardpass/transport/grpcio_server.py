"""The grpcio transport: every method, on grpcio's asyncio server, with TLS if configured.

Unary methods are registered as client-streaming ones, which are the same on the wire: grpcio's asyncio server sends no
status at all to a unary call that ends without a message, and would wait for ever for a message that never comes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import grpc

from forwardpass import protocol
from forwardpass.errors import RequestError, RunFailed
from forwardpass.observability.log_limit import LogLimit
from forwardpass.protocol.status import status_of
from forwardpass.security.certificates import Certificates, ServerCertificate
from forwardpass.transport import addresses
from forwardpass.transport.interface import Handler, Handlers, Metadata
from forwardpass.transport.memory_budget import COUNTED_FROM, Holding, MemoryBudget, Share, no_room

logger = logging.getLogger(__name__)
logger.addFilter(LogLimit())

CODES = {code.value[0]: code for code in grpc.StatusCode}
LOOK_SECONDS = 1.0  # between two checks that a server still serves


class GrpcioServer:
    """Owns the grpcio servers: one for all methods, one for health alone. Used on the event loop.

    A call whose path is not UTF-8 ends the loop of grpcio's server, and with it the port; `lost` is then called.
    """

    def __init__(
        self,
        handlers: Handlers,
        max_message_bytes: int,
        max_streams: int,
        max_metadata_bytes: int,
        max_connection_age: float = 0.0,
        max_bytes: int = 512 << 20,
    ) -> None:
        """`max_bytes`: of large answers, from when they are asked for until they have left."""
        self._handlers = handlers
        self._shares = Shares(MemoryBudget(max_bytes))
        # gRPC itself adds a jitter of a tenth to the age; calls under way may take as long as they need.
        aging = [("grpc.max_connection_age_ms", int(max_connection_age * 1000))] if max_connection_age else []
        self._options = [
            *aging,
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", max_streams),
            ("grpc.max_metadata_size", max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", max_metadata_bytes),
            ("grpc.so_reuseport", 0),  # two servers on one port would share its traffic silently
        ]
        self._server: Any = None
        self._probed: Any = None  # the server for health alone
        self._stopping = False
        self._watches: list[asyncio.Task[None]] = []

    def listen(self, host: str, port: int, certificates: Certificates | None = None) -> int:
        """Bind, before `start`. Returns the port. `certificates` None: plaintext.

        Raises OSError or RuntimeError if binding fails.
        """
        self._server = grpc.aio.server(options=self._options)
        self._server.add_generic_rpc_handlers(_generic_handlers(self._handlers, self._shares))
        if certificates is not None:
            credentials = _credentials(certificates)
            return _bind(lambda address: self._server.add_secure_port(address, credentials), host, port)
        return _bind(self._server.add_insecure_port, host, port)

    def listen_health(self, host: str, port: int) -> int:
        """As `listen`, for a plaintext port that serves health alone: for probes, which have no certificate."""
        self._probed = grpc.aio.server(options=[("grpc.max_receive_message_length", 4096), ("grpc.so_reuseport", 0)])
        self._probed.add_generic_rpc_handlers(
            _generic_handlers({protocol.HEALTH_SERVICE: self._handlers[protocol.HEALTH_SERVICE]}, self._shares)
        )
        return _bind(self._probed.add_insecure_port, host, port)

    async def start(self, lost: Callable[[str], None]) -> None:
        """Start serving. `lost` is called with the reason if a server ends without `stop`."""
        for server, port in ((self._server, "the gRPC port"), (self._probed, "the port for health")):
            if server is not None:
                await server.start()
                self._watches.append(asyncio.create_task(self._watch(server, port, lost)))

    async def _watch(self, server: Any, port: str, lost: Callable[[str], None]) -> None:
        why = "grpcio's server ended"
        try:
            while await server.wait_for_termination(LOOK_SECONDS):
                pass
        except Exception as error:  # whatever ended its loop
            why = f"grpcio's server failed: {error}"
        if not self._stopping:
            lost(f"{port} serves no more: {why}")

    async def stop(self, seconds: float) -> None:
        """Accept no more calls, and give those under way `seconds` to finish."""
        self._stopping = True
        if self._probed is not None:
            await self._probed.stop(0.0)
        if self._server is not None:
            await self._server.stop(seconds)


def _bind(add: Callable[[str], int], host: str, port: int) -> int:
    """Listen on every address of the host. Returns the port."""
    path = addresses.unix_path(host)
    if path is not None:
        addresses.clear_unix(path)
        add(addresses.endpoint(host, port))
        Path(path).chmod(addresses.UNIX_MODE)
        return 0
    for address in addresses.bindable(host):
        port = int(add(addresses.endpoint(address, port)))
    return port


def _credentials(certificates: Certificates) -> Any:
    """Credentials for `add_secure_port`. Open connections keep the certificate they were made with."""
    given = certificates.current()

    def changed() -> Any:
        """Called by gRPC, on its own thread, at each new connection. Returns None if nothing changed."""
        nonlocal given
        current = certificates.current()
        if current is given:
            return None
        given = current
        return _configuration(given)

    return grpc.dynamic_ssl_server_credentials(_configuration(given), changed, given.authority is not None)


def _configuration(certificate: ServerCertificate) -> Any:
    return grpc.ssl_server_certificate_configuration([(certificate.key, certificate.chain)], certificate.authority)


def _generic_handlers(handlers: Handlers, shares: Shares) -> tuple[Any, ...]:
    found = []
    for service, methods in handlers.items():
        made = {}
        for name, handler in methods.items():
            make = grpc.stream_stream_rpc_method_handler if handler.streams else grpc.stream_unary_rpc_method_handler
            made[name] = make(_adapted(handler, shares))
        found.append(grpc.method_handlers_generic_handler(service, made))
    return tuple(found)


def _adapted(handler: Handler, shares: Shares) -> Callable[[Any, Any], Any]:
    """Wrap a handler in the signature that grpcio calls."""

    async def call(_iterator: Any, context: Any) -> bytes | None:
        try:
            answer = await handler.function(GrpcioCallContext(context, shares))
            if answer is not None and len(answer) >= COUNTED_FROM:
                _hold_until_sent(len(answer), shares.of(context), context)
            return answer
        except RequestError as error:
            failure = error
        except Exception:
            logger.exception("a call failed unexpectedly")
            failure = RunFailed("internal error; the server's log has the details")
        code, text, trailers = status_of(failure)
        await context.abort(CODES[code], text, tuple(trailers or ()))
        raise AssertionError("abort returned")

    return call


def _hold_until_sent(nbytes: int, share: Share, context: Any) -> None:
    """Count a unary call's answer until grpcio is done with the call. Raises Overloaded if there is no room for it."""
    holding = Holding(share)
    if not holding.resize(nbytes):
        raise no_room(nbytes)
    context.add_done_callback(lambda _: holding.release())


class Shares:
    """The share of every connection that has calls, by its client's address."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._by_peer: WeakValueDictionary[str, Share] = WeakValueDictionary()

    def of(self, context: Any) -> Share:
        peer = context.peer()
        share = self._by_peer.get(peer)
        if share is None:
            share = self._by_peer[peer] = Share(self._budget)
        return share


class GrpcioCallContext:
    """A call of grpcio's asyncio server, as its handler sees it (`CallContext`)."""

    def __init__(self, context: Any, shares: Shares) -> None:
        self._context = context
        self._shares = shares
        left = context.time_remaining()
        self._deadline = None if left is None else time.monotonic() + left

    @property
    def metadata(self) -> Metadata:
        metadata: Metadata = self._context.invocation_metadata() or ()
        return metadata

    @property
    def seconds_left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    @property
    def share(self) -> Share:
        return self._shares.of(self._context)

    async def read(self) -> bytes | None:
        message = await self._context.read()
        return None if message is grpc.aio.EOF else message

    async def write(self, message: bytes) -> None:
        await self._context.write(message)

    def set_trailers(self, trailers: Metadata) -> None:
        self._context.set_trailing_metadata(tuple(trailers))
