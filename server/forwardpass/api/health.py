"""grpc.health.v1: the health of the server and of each model, and watching it for changes.

Service names: "" for the server, "inference.GRPCInferenceService" for the same, a model's name for that model, and
"grpc.health.v1.Health" for the process: SERVING as long as it answers, which is what a liveness probe must check.
Used on the event loop: no locks.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from forwardpass import protocol
from forwardpass.errors import UnknownModel, printable
from forwardpass.repository.model_version import ModelVersion, VersionState
from forwardpass.repository.repository import Repository

SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3


class Health:
    """Answers Check, Watch and List."""

    def __init__(self, repository: Repository, ready: Callable[[], bool], accepting: Callable[[], bool]) -> None:
        """`ready`: whether the server as a whole is ready. `accepting`: whether models that serve take calls."""
        self._repository = repository
        self._ready = ready
        self._accepting = accepting
        self._changed = asyncio.Event()
        self._over = False

    def changed(self) -> None:
        """Wake the watchers: something that `status` depends on changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    def end(self) -> None:
        """The server is stopping: end every watch after its last status."""
        self._over = True
        self.changed()

    def status(self, service: str) -> int:
        """The status of one service name; SERVICE_UNKNOWN if there is no such service."""
        if service == protocol.HEALTH_SERVICE:
            return SERVING
        if service in ("", protocol.INFERENCE_SERVICE):
            return SERVING if self._ready() else NOT_SERVING
        entries = self._repository.entries(service)
        return self._of(entries) if entries else SERVICE_UNKNOWN

    def _of(self, entries: Iterable[ModelVersion]) -> int:
        """The status of one model by its versions. One that its first request will load serves."""
        serves = any(
            e.state is VersionState.READY or (self._repository.loads_on_demand and e.phase != "failed") for e in entries
        )
        return SERVING if self._accepting() and serves else NOT_SERVING

    def check(self, request: Any) -> Any:
        status = self.status(request.service)
        if status == SERVICE_UNKNOWN:
            raise UnknownModel(f"there is no service '{printable(request.service)}' to ask the health of")
        return protocol.HealthCheckResponse(status=status)

    def list(self, _request: Any) -> Any:
        response = protocol.HealthListResponse()
        response.statuses[""].status = self.status("")
        for name, entries in itertools.groupby(self._repository.entries(), lambda e: e.name):
            response.statuses[name].status = self._of(entries)
        return response

    async def watch(self, request: Any) -> AsyncIterator[Any]:
        """Yield the status now and after every change of it, until the client leaves or the server ends."""
        last = -1
        while True:
            change = self._changed
            status = self.status(request.service)
            if status != last:
                last = status
                yield protocol.HealthCheckResponse(status=status)
            if self._over:
                return
            await change.wait()
