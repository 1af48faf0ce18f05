"""The ports through which clients reach the server: wired, listening, asked to drain, closed.

One handler for each RPC serves all of them (`api.router`); ModelInfer on the direct transport goes past it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from forwardpass.api.health import Health
from forwardpass.api.infer import AsyncInference
from forwardpass.api.log_settings import LogSettings
from forwardpass.api.router import Router
from forwardpass.api.service import ControlService
from forwardpass.batching.admission import Admission
from forwardpass.errors import SettingsError, UnknownMethod
from forwardpass.inference.intake import Intake
from forwardpass.inference.load_waits import LoadWaits
from forwardpass.inference.shared_memory import SharedMemoryRegions, SharedMemoryService
from forwardpass.observability.model_metrics import ModelMetrics
from forwardpass.repository.control import ModelControl
from forwardpass.repository.repository import Repository
from forwardpass.security.policy import SecurityConfig
from forwardpass.security.tokens import Role
from forwardpass.server.process_group import ProcessGroup
from forwardpass.settings import Settings
from forwardpass.status.asgi import responder
from forwardpass.status.page import StatusPage
from forwardpass.transport import addresses
from forwardpass.transport.addresses import endpoint
from forwardpass.transport.grpcio_server import GrpcioServer
from forwardpass.transport.http2 import sockets
from forwardpass.transport.http2.limits import Http2Limits
from forwardpass.transport.http2.server import Http2Server
from forwardpass.transport.interface import Metadata, ReplySink
from forwardpass.transport.rest.application import RestApplication, RestLimits
from forwardpass.transport.rest.server import RestServer

CallT = TypeVar("CallT")

# Responses are sent before accounting. Statistics readers wait up to this long for in-flight accounting, so a client
# sees its own request counted.
ACCOUNTS_SECONDS = 0.02

# How long a stopping server waits for calls that were on their way when it asked its clients to leave. Clients
# acknowledge that within a round trip; those that do not are given one sweep of the sockets.
SETTLE_SECONDS = 2.5
# The same for the HTTP port, where a client learns it from the response to its next request.
HTTP_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the endpoints offer to clients."""

    repository: Repository
    control: ModelControl
    admission: Admission
    waits: LoadWaits | None  # of calls whose models must be loaded; None: models are not loaded on demand
    metrics: ModelMetrics  # of requests without a model
    security: SecurityConfig
    regions: SharedMemoryRegions | None  # None: shared memory is turned off
    health: Health
    is_ready: Callable[[], bool]
    flight: Callable[[str], bytes | None]  # returns a dump of the flight recorder; blocks


class Endpoints:
    """Used on the event loop. `open`, then at the end `drain` and `close`; `close` alone is enough."""

    def __init__(
        self,
        settings: Settings,
        services: Services,
        lost: Callable[[str], None],
        page: StatusPage | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        """`lost` is called with the reason, from any thread, if a port serves no more. `page`: of the HTTP port.

        `group` None: the ports are this process's own.
        """
        self._group = group
        self._settings = settings
        self._page = page
        self._services = services
        self._lost = lost
        self._router = self._route()
        self._grpcio = GrpcioServer(
            self._router.handlers,
            settings.max_message_bytes,
            settings.max_streams,
            settings.max_metadata_bytes,
            settings.max_connection_age,
            settings.max_bytes,
        )
        self._http2: Http2Server | None = None  # the direct transport; listens in grpcio's place
        self._rest: RestServer | None = None

    def _intake(self, reply_sink: ReplySink[CallT]) -> Intake[CallT]:
        services = self._services
        return Intake(
            reply_sink,
            services.repository,
            services.admission,
            services.metrics,
            self._settings.max_message_bytes,
            regions=services.regions,
            waits=services.waits,
        )

    def _route(self) -> Router:
        services, admission = self._services, self._services.admission
        extensions = ["system_shared_memory"] if services.regions is not None else []
        control = ControlService(
            services.repository,
            services.is_ready,
            services.control,
            tuple(extensions),
            self._settings.max_message_bytes,
        )

        async def counted(request: Any) -> Any:
            for _ in range(int(ACCOUNTS_SECONDS * 1e3)):
                if not admission.requests:
                    break
                await asyncio.sleep(1e-3)
            return control.model_statistics(request)

        unary = {
            **control.methods,
            **SharedMemoryService(services.regions).methods,
            **LogSettings(services.repository.resolve, tracing=services.metrics.tracing).methods,
            "ModelStatistics": counted,
        }
        if self._group is not None:
            unary |= self._group.shared(unary)
        inference = AsyncInference(self._intake)
        tokens = services.security.tokens
        return Router(unary, services.health, services.metrics, inference, tokens, self._settings.reflection)

    async def open(self, say: Callable[[str], None]) -> None:
        """Listen, and print each port. Raises SettingsError if a port can't be had."""
        settings, certificates = self._settings, self._services.security.certificates
        if settings.health_port >= 0:
            beside, port = addresses.beside(settings.host), settings.health_port
            bound = bind(lambda: self._grpcio.listen_health(beside, port), endpoint(beside, port))
            say(f"health {endpoint(beside, bound)}")
        address = endpoint(settings.host, settings.grpc_port)
        direct = self._direct()
        if direct:
            self._http2 = bind(self._listen_http2, address)
            port = self._http2.port
        else:
            port = bind(lambda: self._grpcio.listen(settings.host, settings.grpc_port, certificates), address)
        self._listen_rest(say)
        await self._grpcio.start(self._lost)
        if self._http2 is not None:
            self._http2.start()
        tls = ", TLS" if certificates else ""
        say(f"grpc {endpoint(settings.host, port)} ({'direct' if direct else 'grpcio'}{tls})")

    def _direct(self) -> bool:
        if self._settings.transport == "direct" and not sockets.AVAILABLE:
            raise SettingsError("transport: direct needs Linux; expected auto or grpcio here")
        return self._settings.transport != "grpcio" and sockets.AVAILABLE

    def _listen_http2(self) -> Http2Server:
        settings, security = self._settings, self._services.security
        bounds = Http2Limits(
            max_streams=settings.max_streams,
            max_metadata_bytes=settings.max_metadata_bytes,
            max_message_bytes=settings.max_message_bytes,
            max_unread_seconds=settings.max_unread_seconds,
            max_bytes=settings.max_bytes,
            max_connection_age=settings.max_connection_age,
        )
        soon = asyncio.get_running_loop().call_soon_threadsafe
        tls = None if security.certificates is None else security.certificates.context
        authorize = None if security.tokens is None else partial(security.tokens.refusal, needed=Role.INFER)
        return Http2Server(
            settings.host,
            settings.grpc_port,
            bounds,
            make_sink=self._intake,
            handlers=self._router.handlers,
            call_soon=soon,
            authorize=authorize,
            tls=tls,
            lost=self._lost,
            handed=None if self._group is None else self._group.grpc,
        )

    def _listen_rest(self, say: Callable[[str], None]) -> None:
        settings, certificates = self._settings, self._services.security.certificates
        if not serves_http(settings):
            return
        limits = RestLimits(settings.max_message_bytes, settings.max_bytes)
        mounted = None if self._page is None else responder(self._page)
        application = RestApplication(self._router.handlers, limits, mounted, self._flight)
        rest = self._rest = RestServer(application, settings.max_metadata_bytes)
        port = bind(
            lambda: rest.listen(
                settings.host, settings.http_port, certificates, None if self._group is None else self._group.http
            ),
            f"{endpoint(settings.host, settings.http_port)} for HTTP (--http-port picks another port, -1 none)",
        )
        rest.start()
        url = f"{'https' if certificates else 'http'}://{endpoint(settings.host, port)}"
        say(f"http {url}")
        if self._page is not None:
            say(f"status {url}/")

    async def _flight(self, metadata: Metadata) -> bytes:
        """A dump of the flight recorder, for a caller of the role admin."""
        tokens = self._services.security.tokens
        refusal = None if tokens is None else tokens.refusal(metadata, Role.ADMIN)
        if refusal is not None:
            raise refusal
        dump = await asyncio.to_thread(self._services.flight, "asked for")
        if dump is None:
            raise UnknownMethod("the flight recorder is turned off: --flight-batches 0")
        return dump

    def part_with(self, clients: int) -> None:
        """Ask so many clients of the gRPC port to connect anew; their calls are served."""
        if self._http2 is not None:
            self._http2.part_with(clients)

    def accepts(self) -> bool:
        """Whether the HTTP port's listeners still work. The gRPC ports watch themselves."""
        return self._rest is None or self._rest.accepts()

    async def drain(self, until: float, hurry: asyncio.Event) -> None:
        """Ask clients to connect elsewhere, and take the calls that are on their way.

        Returns when there are none any more, at `until` on the monotonic clock, or once `hurry` is set. No client that
        is asked to leave is rejected: calls on their way are served, later ones go elsewhere.
        """
        rest, http2 = self._rest, self._http2
        if rest is not None:
            rest.drain()
        if http2 is not None:
            http2.drain()
        began = time.monotonic()
        while not hurry.is_set() and (now := time.monotonic()) < until:
            on_grpc = http2 is not None and not http2.settled.is_set() and now < began + SETTLE_SECONDS
            on_http = rest is not None and rest.connections > 0 and now < began + HTTP_SECONDS
            if not (on_grpc or on_http):
                break
            await asyncio.sleep(0.01)

    async def close(self, seconds: float = 0.0) -> None:
        """Close the ports. Streams, and calls that are being answered, get `seconds` to end."""
        if self._page is not None:
            self._page.stop()
        await self._router.end_streams(seconds)
        if self._http2 is not None:
            await asyncio.to_thread(self._http2.close)
        if self._rest is not None:
            await self._rest.stop(seconds)
        await self._grpcio.stop(seconds)


def serves_http(settings: Settings) -> bool:
    """Whether there is an HTTP port."""
    return settings.http_port >= 0 and addresses.unix_path(settings.host) is None


def bind(listen: Callable[[], Any], address: str) -> Any:
    """Call `listen()`, and raise a failure to bind as one clear error."""
    try:
        return listen()
    except (OSError, RuntimeError) as error:
        raise SettingsError(f"cannot listen on {address}: {error}") from None
