"""The worker processes of one server: started, assigned, watched, replaced when they die, hang or must be renewed.

A process that waits (the spare) has imported everything, and takes the place of one that dies at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final

from forwardpass.errors import Draining, ForwardpassError
from forwardpass.processes.messages import Assignment, State
from forwardpass.processes.restarts import RestartPolicy
from forwardpass.processes.worker_process import WorkerProcess
from forwardpass.repository.shared_measurements import Known

logger = logging.getLogger(__name__)

REPORT_SECONDS: Final = 1.0  # between two reports of a process: what a killed one's counts may lack
HANG_SECONDS: Final = 10.0  # beyond the longest run
STOP_SECONDS: Final = 5.0  # beyond the grace, after which a process that drains is killed

Functions = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class KeeperHooks:
    """What the keeper has others do. Called on the event loop."""

    functions: Callable[[WorkerProcess], Functions]  # what a process may call, beside what it tells the keeper
    assign: Callable[[Known | None, bool], Assignment]  # from what was measured, and whether the server has started
    report: Callable[[WorkerProcess], Coroutine[Any, Any, None]]  # takes a report; raises Draining if it ends
    catch_up: Callable[[WorkerProcess], Coroutine[Any, Any, None]]  # makes in a new process what was changed in others
    ended: Callable[[WorkerProcess], None]  # a process has ended, for whatever reason
    changed: Callable[[], None]  # which processes serve, or what they serve, has changed
    say: Callable[[str], None]


class Slot:
    """A place among the processes: which one has it, and how often one was lost."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: WorkerProcess | None = None
        self.policy = RestartPolicy()


class ProcessKeeper:
    """Used on the event loop. `start`, then at the end `stop`."""

    def __init__(self, count: int, run_timeout: float, grace: float, hooks: KeeperHooks) -> None:
        """`run_timeout`: seconds of the longest run. `grace`: seconds that a process gets to finish its calls."""
        self.complete = False  # every process has served, or tried to
        self.stopping = asyncio.Event()
        self.all: list[WorkerProcess] = []  # that live, those that wait or drain included
        self.first: WorkerProcess | None = None
        self._count = count
        self._patience = run_timeout + HANG_SECONDS
        self._grace = grace
        self._hooks = hooks
        self._slots = [Slot(number) for number in range(1, count + 1)]
        self._spare: WorkerProcess | None = None
        self._sparing = False  # one is being started
        self._known: Known | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._renewing = asyncio.Lock()

    def current(self) -> list[WorkerProcess]:
        """The processes that have a place, whether they serve already or not."""
        return [slot.process for slot in self._slots if slot.process is not None and not slot.process.ended.is_set()]

    def members(self) -> list[WorkerProcess]:
        """The processes that serve, and so take part in every change."""
        return [process for process in self.current() if process.accepts]

    def ready(self) -> list[WorkerProcess]:
        """Those that have every model that should serve."""
        return [process for process in self.members() if process.ready]

    def states(self) -> list[str]:
        """The state of every process, as forwardpass_processes has it."""
        draining = ["draining" for process in self.all if process.leaving]
        ready = len(self.ready())
        return draining + ["ready"] * ready + ["starting"] * (self._count - ready)

    # -- the start ----------------------------------------------------------------------------------------------------

    async def launch(self) -> None:
        """Start all processes, which then wait for their assignments."""
        for slot in self._slots:
            slot.process = await self._started()
        self.first = self._slots[0].process

    async def start(self) -> bool:
        """Have all processes serve: the first one measures for the others. False: the first one ended, and said why."""
        first, *others = self.current()
        if not await self._serve_with(first):
            return False
        with contextlib.suppress(Draining):
            self._known = await first.channel.call("known")
        await asyncio.gather(*(self._serve_with(process) for process in others))
        self.complete = True
        for slot in self._slots:
            self._begin(self._keep(slot))
        self._hooks.changed()
        await self._see_to_spare()
        return True

    async def _started(self) -> WorkerProcess:
        """Start a process, which will wait for its assignment. Raises OSError where the machine lets none start."""
        process = WorkerProcess(self._functions)
        self.all.append(process)
        self._begin(self._bury(process))
        await process.open()
        return process

    def _functions(self, process: WorkerProcess) -> Functions:
        def changed(state: State) -> None:
            process.take(state)
            self._hooks.changed()

        own: Functions = {"joined": process.joined.set, "state": changed, "waits": process.waits.set}
        return {**own, **self._hooks.functions(process)}

    async def _serve_with(self, process: WorkerProcess) -> bool:
        """Assign a process, and wait until it has loaded. Returns whether it serves; False if it ended before."""
        await _either(process.waits, process.ended)
        process.begin(self._hooks.assign(self._known, self.complete))
        if not await _either(process.joined, process.ended):
            return False
        self._begin(self._beat(process))
        if not self.complete:  # clients learn from any process that models are being loaded
            process.accepts = True
        if not await _either(process.loaded, process.ended):
            return False
        await self._hooks.catch_up(process)
        process.accepts = not process.ended.is_set() and not process.leaving
        process.ready_since = time.monotonic()
        return process.accepts

    # -- while it serves ----------------------------------------------------------------------------------------------

    async def _keep(self, slot: Slot) -> None:
        """Replace the process of a slot whenever it dies, until the server stops."""
        while not self.stopping.is_set():
            process = slot.process
            assert process is not None
            await process.ended.wait()
            lasted = time.monotonic() - process.ready_since if process.ready_since else 0.0
            while self._is_vacant(slot, process) and not await self._fill(slot, process, lasted):
                lasted = 0.0

    def _is_vacant(self, slot: Slot, process: WorkerProcess) -> bool:
        """Whether a slot needs another process since `process` has ended; a renewal may have filled it meanwhile."""
        return slot.process is process and not self.stopping.is_set()

    async def _fill(self, slot: Slot, ended: WorkerProcess, lasted: float) -> bool:
        """Have another process take the place of one that ended after serving for so long. False: none could start."""
        what = f"process {slot.number} of {self._count}"
        wait = slot.policy.ended(lasted)
        if wait:
            self._hooks.say(f"{what}: ended {slot.policy.ends} times in a row; the next one starts in {wait:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), wait)
            if not self._is_vacant(slot, ended):
                return True
        began = time.monotonic()
        following, self._spare = self._spare, None
        try:
            if following is None or following.ended.is_set():
                following = await self._started()
        except OSError as error:
            logger.error("%s: no process can be started: %s", what, error.strerror or error)
            return False
        if not self._is_vacant(slot, ended):
            following.stop()
            return True
        slot.process = following
        if await self._serve_with(following):
            self._hooks.say(f"{what}: replaced in {time.monotonic() - began:.2f} s")
        self._hooks.changed()
        await self._see_to_spare()
        return True

    async def _see_to_spare(self) -> None:
        """Start a process that waits, unless one does or another task starts one."""
        if self._spare is not None or self._sparing or self.stopping.is_set():
            return
        self._sparing = True
        try:
            self._spare = await self._started()
        except OSError as error:  # the next replacement tries again
            logger.warning("no process that waits can be started: %s", error.strerror or error)
        finally:
            self._sparing = False

    async def _bury(self, process: WorkerProcess) -> None:
        """Once a process has ended, note what it died of unless it was asked to end."""
        await process.ended.wait()
        self.all.remove(process)
        self._hooks.ended(process)
        if not process.leaving and not self.stopping.is_set():
            how = f"with status {process.status}" if process.cause == "exited" else f"by {process.cause}"
            logger.error("process %d ended %s", process.pid, how)
            self._hooks.changed()

    async def _beat(self, process: WorkerProcess) -> None:
        """Take a process's reports. One that sends none, or whose reading thread stands still, is killed.

        Seconds are counted, not looked up: time in which the whole server stood still (a paused container) is nobody's
        fault.
        """
        still = 0.0
        while not process.ended.is_set():
            if not await self._reports(process):
                self._end_hung(process, "it has answered nothing")
                return
            turns = process.ports["grpc"].counts.turns
            still = still + REPORT_SECONDS if turns == process.turns else 0.0
            process.turns = turns
            if still > self._patience and not process.leaving:
                self._end_hung(process, "its gRPC port was not read")
                return
            await asyncio.sleep(REPORT_SECONDS)

    async def _reports(self, process: WorkerProcess) -> bool:
        """Take one report. False: it does not come."""
        report = asyncio.ensure_future(self._hooks.report(process))
        try:
            for _ in range(math.ceil(self._patience / REPORT_SECONDS)):
                await asyncio.wait([report], timeout=REPORT_SECONDS)
                if report.done():
                    with contextlib.suppress(ForwardpassError):  # it failed, and was logged: an answer all the same
                        report.result()
                    return True
            return False
        finally:
            report.cancel()

    def _end_hung(self, process: WorkerProcess, why: str) -> None:
        if process.ended.is_set():
            return
        logger.error(
            "process %d hangs: %s for %g s; its stacks follow, and it is killed", process.pid, why, self._patience
        )
        process.hung = True
        process.signal(signal.SIGUSR1)
        asyncio.get_running_loop().call_later(0.5, process.signal, signal.SIGKILL)

    # -- renewal and the end ------------------------------------------------------------------------------------------

    async def renew(self) -> None:
        """Replace each process by a new one that reads everything anew, one after the other.

        A new one that does not serve what the old one does is given up, and the others stay as they are.
        """
        if not self.complete:
            return
        async with self._renewing:
            spare, self._spare = self._spare, None
            if spare is not None:
                spare.stop()  # it has the code that was there when it was started
            for slot in self._slots:
                if self.stopping.is_set() or not await self._renew(slot):
                    break
            await self._see_to_spare()

    async def _renew(self, slot: Slot) -> bool:
        old = slot.process
        assert old is not None
        what = f"SIGHUP: process {slot.number} of {self._count}"
        try:
            new = await self._started()
        except OSError as error:
            self._hooks.say(f"{what}: NOT replaced, the old one goes on: {error.strerror or error}")
            return False
        serves = await self._serve_with(new)
        lost = set() if old.ended.is_set() else old.serves() - new.serves()
        if not serves or lost or self.stopping.is_set():
            new.stop()
            why = f"it does not serve {', '.join(sorted(lost))}" if serves and lost else "it ended before it served"
            self._hooks.say(f"{what}: NOT replaced, the old one goes on: {why}")
            return False
        # If the old one has died meanwhile, its follower has its place already, or is about to serve there.
        going = [process for process in {old, slot.process or old} if not process.ended.is_set()]
        slot.process = new
        for process in going:
            process.stop()
            self._begin(self._see_off(process))
        self._hooks.changed()
        self._hooks.say(f"{what}: replaced")
        return True

    async def _see_off(self, process: WorkerProcess) -> None:
        """Kill a process that does not end by itself when it should have."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace + STOP_SECONDS):
                await process.ended.wait()
        process.signal(signal.SIGKILL)

    async def stop(self, hurry: asyncio.Event) -> None:
        """Have every process finish its calls and end; those that do not are killed. `hurry`: they must not wait."""
        self.stopping.set()
        for process in self.all:
            process.stop()

        async def hurried() -> None:
            await hurry.wait()
            for process in self.all:
                process.stop()

        self._begin(hurried())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace + STOP_SECONDS):
                while self.all:
                    await self.all[0].ended.wait()
                    await asyncio.sleep(0)

    def close(self) -> None:
        """Kill what is left."""
        self.stopping.set()
        for process in self.all:
            process.signal(signal.SIGKILL)
        for task in self._tasks:
            task.cancel()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _either(wanted: asyncio.Event, ended: asyncio.Event) -> bool:
    """Wait for one of two events. Returns whether it is the first one."""
    waits = [asyncio.ensure_future(event.wait()) for event in (wanted, ended)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    return wanted.is_set() and not ended.is_set()
