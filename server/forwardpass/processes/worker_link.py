"""A worker process's side of its group: what it asks the supervisor, and what the supervisor may ask of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

from forwardpass import protocol
from forwardpass.api.model_statistics import statistics
from forwardpass.errors import Draining, RepositoryUnreadable
from forwardpass.model.options import ModelConfig
from forwardpass.processes.channel import Channel
from forwardpass.processes.merged_samples import SampleRecorder
from forwardpass.processes.merged_statistics import Labels
from forwardpass.processes.messages import Report, State, VersionView
from forwardpass.repository.control import CHANGES
from forwardpass.repository.model_folder import ModelFolder
from forwardpass.server.process_group import GroupMember, Methods
from forwardpass.status.snapshot import ProcessSample
from forwardpass.transport.handed_listener import HandedListener

# What the supervisor answers for all processes: the statistics and the index, and what changes any of them.
ANSWERED_FOR_ALL: Final = (
    "LogSettings",
    "ModelStatistics",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
    "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister",
    "TraceSetting",
)
T = TypeVar("T")
GATHER_SECONDS: Final = 0.02  # in which changes of models are sent as one


class WorkerLink:
    """Implements `ProcessGroup`. Used on the event loop."""

    def __init__(self, channel: Channel, grpc: HandedListener, http: HandedListener) -> None:
        self.grpc, self.http = grpc, http
        self.ready = False
        self._channel = channel
        self._member: GroupMember | None = None
        self._own: Methods = {}
        self._accepts = self._complete = False
        self._sending: asyncio.TimerHandle | None = None
        self._recorder = SampleRecorder()
        self._reported: dict[Labels, bytes] = {}
        self._reports = 0
        # Of its own: a report that waits for other work is taken for a process that hangs.
        self._reporting = ThreadPoolExecutor(1, "group-report")
        # Each waits until other processes have made the same change: with fewer threads than the supervisor makes
        # changes at a time, two processes could wait for each other.
        self._changes = ThreadPoolExecutor(CHANGES, "group-change")
        self._under_way: set[Future[Any]] = set()

    def functions(self) -> dict[str, Callable[..., Any]]:
        """What the supervisor may call."""
        return {
            "apply": self.apply,
            "forget": lambda name: self._change(self._repository.forget, name),
            "known": lambda: self._repository.measurements.known(),
            "part_with": lambda count: self._of_group.part_with(count),
            "relist": self._relist,
            "reload": self._reload,
            "report": self.report,
            "serving": self._serving,
            "status": lambda: asyncio.to_thread(self._of_group.status),
            "unload": lambda name: self._change(self._repository.unload, name),
        }

    @property
    def _of_group(self) -> GroupMember:
        if self._member is None:
            raise Draining("the process has not begun to serve")
        return self._member

    @property
    def _repository(self) -> Any:
        return self._of_group.repository

    # -- ProcessGroup -------------------------------------------------------------------------------------------------

    def shared(self, own: Methods) -> Methods:
        self._own = dict(own)  # the caller puts what is shared in their place
        return {name: self._asking(name) for name in ANSWERED_FOR_ALL if name in own}

    def _asking(self, name: str) -> Callable[[Any], Awaitable[Any]]:
        response = protocol.METHODS[name].response

        async def ask(request: Any) -> Any:
            return response.FromString(await self._channel.call("answer", name, request.SerializeToString()))

        return ask

    def join(self, member: GroupMember) -> None:
        self._member = member
        member.repository.agree = lambda name, failed: self._channel.call_from_thread("agree", name, dict(failed))
        self._channel.tell("joined")

    def changed(self, accepts: bool, complete: bool) -> None:
        self._accepts, self._complete = accepts, complete
        if self._sending is None:
            self._sending = asyncio.get_running_loop().call_later(GATHER_SECONDS, self._send_state)

    def _send_state(self) -> None:
        self._sending = None
        with contextlib.suppress(Draining):
            self._channel.tell("state", self._state())

    def _state(self) -> State:
        repository = self._repository
        versions = tuple(VersionView.of(entry) for entry in repository.entries())
        return State(self._accepts, self._complete, versions, tuple(repository.skipped()))

    def others(self) -> list[ProcessSample]:
        found: list[ProcessSample] = self._channel.call_from_thread("others")
        return found

    async def leave(self) -> None:
        with contextlib.suppress(Draining):
            await self._channel.call("left", await self.report(0))
        for threads in (self._changes, self._reporting):
            threads.shutdown(wait=False, cancel_futures=True)

    # -- for the supervisor -------------------------------------------------------------------------------------------

    async def apply(self, name: str, request: bytes) -> bytes:
        """Answer a method by this process alone."""
        found = self._own[name](protocol.METHODS[name].request.FromString(request))
        response: bytes = (await found if asyncio.iscoroutine(found) else found).SerializeToString()
        return response

    async def _reload(self, folder: ModelFolder, config: ModelConfig | None) -> list[VersionView]:
        entries = await self._change(self._repository.reload, folder, config)
        self._send_state()
        return [VersionView.of(entry) for entry in entries]

    async def _change(self, change: Callable[..., T], *arguments: Any) -> T:
        future = self._changes.submit(partial(change, *arguments))
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return await asyncio.wrap_future(future)

    @property
    def unfinished(self) -> bool:
        """Whether a change could not be stopped: the process must not wait for its thread."""
        return bool(self._under_way)

    async def _relist(self) -> None:
        """Look at the repository's folder, for what is skipped there."""
        with contextlib.suppress(RepositoryUnreadable):
            await asyncio.to_thread(self._repository.model_folders)

    def _serving(self, ready: bool) -> None:
        self.ready = ready
        if self._member is not None:
            self._member.wake()

    async def report(self, taken: int) -> Report:
        """What changed since report `taken` if that is the last one, else everything."""
        return await asyncio.get_running_loop().run_in_executor(self._reporting, self._report, taken)

    def _report(self, taken: int) -> Report:
        member = self._of_group
        if taken != self._reports:
            self._recorder.forget()
            self._reported = {}
        member.collect(self._recorder)
        found: dict[Labels, bytes | None] = {}
        reported: dict[Labels, bytes] = {}
        for entry in member.repository.entries():
            if entry.loaded is not None:
                labels = (entry.name, entry.version)
                message = statistics(entry.loaded.worker.metrics).SerializeToString()
                found[labels] = None if self._reported.get(labels) == message else message
                reported[labels] = message
        self._reported = reported
        self._reports += 1
        return Report(self._reports, self._recorder.report(), found)
