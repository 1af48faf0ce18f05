"""The methods that are answered for all processes: made in each, and their answers put together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, cast

from forwardpass import protocol
from forwardpass.api.service import ControlService
from forwardpass.errors import Draining, RequestError
from forwardpass.processes.group_models import GroupModels
from forwardpass.processes.merged_statistics import MergedStatistics
from forwardpass.processes.worker_process import WorkerProcess
from forwardpass.repository.control import ModelControl
from forwardpass.repository.model_version import VersionState
from forwardpass.repository.repository import Repository


class GroupAnswers:
    """Used on the event loop."""

    def __init__(
        self,
        members: Callable[[], list[WorkerProcess]],
        models: GroupModels,
        control: ModelControl,
        statistics: MergedStatistics,
        refresh: Callable[[], Awaitable[None]],
    ) -> None:
        """`refresh` has every process report its statistics."""
        self.changes = 0  # of settings: the number of the last one
        self._members = members
        self._statistics = statistics
        self._refresh = refresh
        self._service = ControlService(cast(Repository, models), lambda: True, control)
        self._log = protocol.message("inference.LogSettingsRequest")()  # all settings that were changed
        self._regions: dict[str, bytes] = {}  # registered shared memory: the requests, by name
        self._answers: dict[str, Callable[[bytes], Awaitable[bytes]]] = {
            "LogSettings": self._log_settings,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelLoad": self._change("RepositoryModelLoad", self._service.repository_model_load),
            "RepositoryModelUnload": self._change("RepositoryModelUnload", self._service.repository_model_unload),
            "SystemSharedMemoryRegister": self._register,
            "SystemSharedMemoryUnregister": self._unregister,
            "TraceSetting": lambda request: self._everywhere("TraceSetting", request),
        }

    async def answer(self, name: str, request: bytes) -> bytes:
        """Answer a call that came to any process. Raises RequestError."""
        return await self._answers[name](request)

    async def catch_up(self, process: WorkerProcess, since: int) -> int:
        """Make in a new process what was set in the others, unless nothing was after number `since`; 0: it has nothing
        yet. Returns the number of the last one."""
        now = self.changes
        if now == since:
            return now
        requests = [("LogSettings", self._log.SerializeToString())] if self._log.settings else []
        if since:  # some that it was given may be gone
            requests.append(("SystemSharedMemoryUnregister", b""))
        requests += [("SystemSharedMemoryRegister", request) for request in self._regions.values()]
        for name, request in requests:
            with contextlib.suppress(RequestError):  # a region's owner may have removed it since
                await process.channel.call("apply", name, request)
        return now

    async def _each(self, name: str, request: bytes) -> dict[WorkerProcess, bytes | RequestError]:
        """What each process answers; those that end meanwhile are left out. Raises Draining if none is left."""
        asked: set[WorkerProcess] = set()
        found: dict[WorkerProcess, bytes | RequestError] = {}
        while members := [process for process in self._members() if process not in asked]:  # some may join meanwhile
            asked.update(members)
            calls = (process.channel.call("apply", name, request) for process in members)
            for process, answer in zip(members, await asyncio.gather(*calls, return_exceptions=True), strict=True):
                if isinstance(answer, RequestError | bytes):
                    if not isinstance(answer, Draining):
                        found[process] = answer
                else:
                    assert isinstance(answer, BaseException)
                    raise answer
        if not found:
            raise Draining("no process is left that could answer; try again", retry_after=0.5)
        return found

    async def _everywhere(self, name: str, request: bytes) -> bytes:
        """The first answer. Raises the first error."""
        answers = (await self._each(name, request)).values()
        for answer in answers:
            if isinstance(answer, RequestError):
                raise answer
        return cast(bytes, next(iter(answers)))

    async def _log_settings(self, request: bytes) -> bytes:
        response = await self._everywhere("LogSettings", request)
        for name, value in protocol.message("inference.LogSettingsRequest").FromString(request).settings.items():
            self._log.settings[name].CopyFrom(value)
        self.changes += 1
        return response

    async def _register(self, request: bytes) -> bytes:
        """In all processes or in none."""
        found = await self._each("SystemSharedMemoryRegister", request)
        name = protocol.METHODS["SystemSharedMemoryRegister"].request.FromString(request).name
        error = next((answer for answer in found.values() if isinstance(answer, RequestError)), None)
        if error is not None:
            undo = protocol.METHODS["SystemSharedMemoryUnregister"].request(name=name).SerializeToString()
            done = [process for process, answer in found.items() if isinstance(answer, bytes)]
            await asyncio.gather(
                *(p.channel.call("apply", "SystemSharedMemoryUnregister", undo) for p in done), return_exceptions=True
            )
            raise error
        self._regions[name] = request
        self.changes += 1
        return cast(bytes, next(iter(found.values())))

    async def _unregister(self, request: bytes) -> bytes:
        response = await self._everywhere("SystemSharedMemoryUnregister", request)
        name = protocol.METHODS["SystemSharedMemoryUnregister"].request.FromString(request).name
        if name:
            self._regions.pop(name, None)
        else:
            self._regions.clear()
        self.changes += 1
        return response

    def _change(self, name: str, method: Callable[[Any], Awaitable[Any]]) -> Callable[[bytes], Awaitable[bytes]]:
        kind = protocol.METHODS[name].request

        async def answer(request: bytes) -> bytes:
            response: bytes = (await method(kind.FromString(request))).SerializeToString()
            return response

        return answer

    async def _model_statistics(self, request: bytes) -> bytes:
        response = protocol.ModelStatisticsResponse.FromString(await self._everywhere("ModelStatistics", request))
        await self._refresh()
        served = [(entry.name, entry.version) for entry in response.model_stats]
        del response.model_stats[:]
        for labels in served:
            total = self._statistics.of(labels)
            if total is not None:
                response.model_stats.append(total)
        data: bytes = response.SerializeToString()
        return data

    async def _repository_index(self, request: bytes) -> bytes:
        """Every version once; where processes differ, the state and reason of one that does not serve it."""
        asked = protocol.METHODS["RepositoryIndex"].request.FromString(request)
        only_ready, asked.ready = asked.ready, False
        merged: dict[tuple[str, str], Any] = {}
        for answer in (await self._each("RepositoryIndex", asked.SerializeToString())).values():
            if isinstance(answer, RequestError):
                raise answer
            for entry in protocol.RepositoryIndexResponse.FromString(answer).models:
                known = merged.setdefault((entry.name, entry.version), entry)
                if known.state == VersionState.READY.value and entry.state != known.state:
                    merged[entry.name, entry.version] = entry
        response = protocol.RepositoryIndexResponse()
        for key in sorted(merged, key=lambda key: (key[0], _number(key[1]), key[1])):
            if not only_ready or merged[key].state == VersionState.READY.value:
                response.models.append(merged[key])
        data: bytes = response.SerializeToString()
        return data


def _number(version: str) -> int:
    return int(version) if version.isdecimal() else 0
