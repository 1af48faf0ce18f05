"""The models of all processes as those of one repository: changes reach all of them or none.

A process that loads a version does not serve it before all others have it too (`Agreement`). What was asked for by
request is remembered, for processes that join later.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from forwardpass.errors import Draining, ForwardpassError
from forwardpass.execution.interruption import Interruption
from forwardpass.model.options import ModelConfig
from forwardpass.processes.messages import VersionView
from forwardpass.processes.worker_process import WorkerProcess
from forwardpass.repository.listing import RepositoryListing
from forwardpass.repository.model_folder import ModelFolder
from forwardpass.repository.model_version import number
from forwardpass.repository.turns import Turns
from forwardpass.settings import Settings

logger = logging.getLogger(__name__)

T = TypeVar("T")
Wanted = tuple[ModelFolder, ModelConfig | None] | None  # None: it was unloaded


class Agreement:
    """One reload, in the processes that take part: each waits for the others before it serves what it loaded."""

    def __init__(self, processes: Sequence[int]) -> None:
        self._missing = set(processes)
        self._failed: dict[str, str] = {}
        self._settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def vote(self, process: int, failed: Mapping[str, str]) -> Mapping[str, str]:
        """What `process` could not load, by version. Returns what any could not load, once all have voted."""
        if process not in self._missing:
            return {}
        for version, reason in failed.items():
            self._failed.setdefault(version, reason)
        self.drop(process)
        await asyncio.shield(self._settled)
        return self._failed

    def drop(self, process: int) -> None:
        """A process has voted, or it will not: it has ended."""
        self._missing.discard(process)
        if not self._missing and not self._settled.done():
            self._settled.set_result(None)


class GroupModels:
    """Has the parts of a Repository that ModelControl and Health use. Changes block, and are made by other threads."""

    def __init__(self, settings: Settings, members: Callable[[], list[WorkerProcess]]) -> None:
        """`members`: the processes that serve, and so take part in changes. Constructed on the event loop."""
        self.interruption = Interruption()
        self.turns = Turns()
        self.listing = RepositoryListing(settings.repository, settings.model_name, settings.ignore_unsupported)
        self._members = members
        self._loop = asyncio.get_running_loop()
        self._agreements: dict[str, Agreement] = {}  # by model
        self._wanted: dict[str, Wanted] = {}  # what was asked for, and could be done
        self._folders: set[Path] = set()  # of versions that any process served
        self._changes = 0
        self._changed_at: dict[str, int] = {}  # by model: the number of its last change
        self._skipped: Mapping[tuple[str, str], str] = {}

    # -- what ModelControl and Health read ----------------------------------------------------------------------------

    def entries(self, name: str | None = None) -> list[VersionView]:
        """Every version by name and number. Where processes differ, one that does not serve it."""
        found: dict[tuple[str, str], VersionView] = {}
        for process in self._members():
            for view in process.state.versions if process.state is not None else ():
                if name is None or view.name == name:
                    known = found.get((view.name, view.version))
                    if known is None or (known.serves and not view.serves):
                        found[view.name, view.version] = view
        return sorted(found.values(), key=lambda view: (view.name, number(view.version)))

    def left(self) -> set[Path]:
        """Folders of versions that were served when this was called last, and that no process serves any more."""
        members = self._members()
        if not members:  # those that take their place are about to serve the same
            return set()
        states = [process.state for process in members if process.state is not None]
        now = {view.folder for state in states for view in state.versions if view.serves}
        left, self._folders = self._folders - now, now
        return left

    def missing(self) -> list[VersionView]:
        return [view for view in self.entries() if view.missing]

    def model_folders(self) -> dict[str, ModelFolder]:
        """The models on disk. Raises RepositoryUnreadable. Blocks."""
        found = self.listing.model_folders()
        if self.listing.skipped != self._skipped:
            self._skipped = dict(self.listing.skipped)
            self._wait(self._ask_all("relist"))
        return found

    # -- changes: any thread but the event loop's ---------------------------------------------------------------------

    def reload(self, folder: ModelFolder, config: ModelConfig | None = None) -> list[VersionView]:
        """See Repository.reload. What one process cannot load, none serves."""
        return self._wait(self._reload(folder, config))

    def unload(self, name: str) -> bool:
        """See Repository.unload."""
        return self._wait(self._without(name, "unload"))

    def forget(self, name: str) -> None:
        """See Repository.forget."""
        self._wait(self._without(name, "forget"))

    def note(self, folders: object) -> None:
        """Does nothing: each process keeps its own index up to date."""

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # -- the event loop -----------------------------------------------------------------------------------------------

    async def vote(self, process: int, name: str, failed: Mapping[str, str]) -> Mapping[str, str]:
        """A process has loaded a model, or failed to. Returns why it must not serve a version, by version."""
        agreement = self._agreements.get(name)
        return {} if agreement is None else await agreement.vote(process, failed)

    def ended(self, process: int) -> None:
        """A process has ended: nobody must wait for it."""
        for agreement in self._agreements.values():
            agreement.drop(process)

    async def catch_up(self, process: WorkerProcess, since: int) -> int:
        """Make the changes after number `since` in a process that missed them. Returns the number of the last one."""
        names = [name for name, change in self._changed_at.items() if change > since]
        now = self._changes
        await asyncio.gather(*(self._apply(process, name, self._wanted[name]) for name in names))
        return now

    def asked_for(self) -> None:
        """The server has started: what it was asked to serve then is what processes that come later must serve."""
        for view in self.entries():
            if view.asked_for and view.model_folder is not None and view.name not in self._wanted:
                self._note(view.name, (view.model_folder.anew(), None))

    @property
    def changes(self) -> int:
        """The number of the last change."""
        return self._changes

    async def _apply(self, process: WorkerProcess, name: str, wanted: Wanted) -> None:
        try:
            if wanted is None:
                await process.channel.call("unload", name)
            else:
                await process.channel.call("reload", *wanted)
        except Draining:
            logger.debug("process %d has ended before it could change model %s", process.pid, name)
        except ForwardpassError as error:  # the others' models must be served there all the same
            logger.error("process %d: model %s is not as in the other processes: %s", process.pid, name, error)

    async def _reload(self, folder: ModelFolder, config: ModelConfig | None) -> list[VersionView]:
        members = self._members()
        agreement = self._agreements[folder.name] = Agreement([process.number for process in members])

        async def reload(process: WorkerProcess) -> list[VersionView]:
            try:
                found: list[VersionView] = await process.channel.call("reload", folder, config)
                return found
            finally:
                agreement.drop(process.number)  # whatever became of it, the others do not wait for it

        try:
            found = await _of_those_left(reload(process) for process in members)
        finally:
            del self._agreements[folder.name]
        merged: dict[str, VersionView] = {}
        for view in (view for of_process in found for view in of_process):
            known = merged.get(view.version)
            if known is None or (view.reason and not known.reason):
                merged[view.version] = view
        # After a failure the processes serve what they served: so must those that come later.
        if folder.name not in self._wanted or not any(view.reason for view in merged.values()):
            wanted = (folder.anew(), config)  # read anew by each process that comes later
            self._note(folder.name, wanted)
            await asyncio.gather(*(self._apply(p, folder.name, wanted) for p in self._late(members)))
        return sorted(merged.values(), key=lambda view: number(view.version))

    async def _without(self, name: str, how: str) -> bool:
        members = self._members()
        found = await self._ask(members, how, name)
        self._note(name, None)
        await asyncio.gather(*(self._apply(p, name, None) for p in self._late(members)))
        return any(found)

    def _late(self, members: Sequence[WorkerProcess]) -> list[WorkerProcess]:
        """Processes that have joined since."""
        return [process for process in self._members() if process not in members]

    def _note(self, name: str, wanted: Wanted) -> None:
        self._changes += 1
        self._wanted[name] = wanted
        self._changed_at[name] = self._changes

    async def _ask_all(self, function: str, *arguments: Any) -> list[Any]:
        return await self._ask(self._members(), function, *arguments)

    async def _ask(self, members: Sequence[WorkerProcess], function: str, *arguments: Any) -> list[Any]:
        return await _of_those_left(process.channel.call(function, *arguments) for process in members)


async def _of_those_left(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What processes answered that did not end meanwhile. Raises Draining if none is left, and what any raises."""
    found: list[T] = []
    for answer in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(answer, Draining):
            continue
        if isinstance(answer, BaseException):
            raise answer
        found.append(answer)
    if not found:
        raise Draining("no process is left that could do it; try again", retry_after=0.5)
    return found
