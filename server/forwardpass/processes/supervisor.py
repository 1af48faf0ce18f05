"""Several processes as one server. The supervisor has the ports and the signals, and answers what concerns them all.

start   ports listen -> the first process loads models and measures -> the others load -> ready
HUP     each process is replaced, one after the other, by one that has read everything anew: code, models, certificates
USR1    every process writes its stacks, models and counters
stop    SIGTERM or SIGINT -> not ready, still accepting for `drain_wait` seconds -> close the ports -> every process
        drains as a server does -> exit 0
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final, cast

from forwardpass.api.health import Health
from forwardpass.api.router import health_handlers
from forwardpass.errors import SettingsError
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.execution.memory_limit import memory_limit
from forwardpass.execution.shared_weights import SharedWeights, temporary_folder
from forwardpass.processes.group_answers import GroupAnswers
from forwardpass.processes.group_metrics import GroupMetrics
from forwardpass.processes.group_models import GroupModels
from forwardpass.processes.merged_statistics import MergedStatistics
from forwardpass.processes.messages import Assignment, Report
from forwardpass.processes.port_spread import PortSpread
from forwardpass.processes.process_keeper import Functions, KeeperHooks, ProcessKeeper
from forwardpass.processes.worker_process import WorkerProcess
from forwardpass.repository.control import ModelControl
from forwardpass.repository.repository import Repository
from forwardpass.repository.shared_measurements import Known
from forwardpass.server.endpoints import bind, serves_http
from forwardpass.server.metrics_port import PATH, MetricsPort
from forwardpass.server.stop import Stop, signals
from forwardpass.settings import Settings
from forwardpass.transport import addresses
from forwardpass.transport.addresses import endpoint
from forwardpass.transport.grpcio_server import GrpcioServer
from forwardpass.transport.http2 import sockets

logger = logging.getLogger(__name__)

EVEN_SECONDS: Final = 5.0  # between two looks at how evenly connections are spread
SCRAPE_SECONDS: Final = 2.0  # that a scrape waits for the processes' reports
STATUS_SECONDS: Final = 0.5  # that the status page waits for other processes
CLOSE_SECONDS: Final = 2.0  # that changes of models get to end once every process has
OWN_LINES: Final = ("grpc ", "http ", "status ", "ready", "draining", "stopped")  # that the supervisor has itself


class Supervisor:
    """`run` is its whole life."""

    def __init__(self, settings: Settings, count: int, cores: CpuBudget, say: Callable[[str], None] = print) -> None:
        """`count`: of processes. `cores`: of the whole server. Raises SettingsError."""
        if settings.transport == "grpcio" or not sockets.AVAILABLE:
            raise SettingsError("processes: several need the direct transport, which needs Linux; expected 1 here")
        self.settings = settings
        self._count = count
        self._cores = cores
        self._say = say
        self._was_ready = False
        self._said_ready = False
        self._started = False
        self._ports: dict[str, PortSpread] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Serve until a signal. Returns the exit status. Raises SettingsError if the server can't start."""
        self._loop = asyncio.get_running_loop()
        settings, stop = self.settings, Stop()
        self._stop = stop
        hooks = KeeperHooks(
            self._functions, self._assignment, self._report_of, self._catch_up, self._ended, self._changed, self._say
        )
        self._keeper = keeper = ProcessKeeper(self._count, settings.run_timeout, settings.grace, hooks)
        self._statistics = MergedStatistics()
        self._metrics = GroupMetrics(self._refresh_blocking, keeper.states, self._pids)
        self._metrics.ready = self._is_ready
        self._models = GroupModels(settings, keeper.members)
        self._control = ModelControl(cast(Repository, self._models), settings)
        self._answers = GroupAnswers(keeper.members, self._models, self._control, self._statistics, self._refresh)
        self._health = Health(cast(Repository, self._models), self._is_ready, self._is_ready)
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(signals(stop, lambda: self._begin(keeper.renew()), self._dump))
            self._weights = stack.enter_context(temporary_folder())
            stack.callback(keeper.close)
            await keeper.launch()
            self._bind()
            stack.callback(self._serve_metrics())
            stack.push_async_callback(await self._serve_health())
            for port in self._ports.values():
                port.start()
            self._begin(self._watch())
            try:
                if not await self._start():
                    return 1
                await stop.first.wait()
                await self._drain()
            finally:
                for task in self._tasks:
                    task.cancel()
                self._health.end()
            self._say("stopped")
            return 1 if self._lost else 0

    _lost = ""  # the reason, once a port has failed for good

    # -- ports --------------------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        settings = self.settings
        wanted = {"grpc": settings.grpc_port} | ({"http": settings.http_port} if serves_http(settings) else {})
        for name, number in wanted.items():
            listen = partial(PortSpread, name, settings.host, number, self._keeper.current)
            self._ports[name] = bind(listen, endpoint(settings.host, number))
        tls = settings.tls_certificate is not None
        self._say(f"grpc {endpoint(settings.host, self._ports['grpc'].port)} (direct{', TLS' if tls else ''})")
        if "http" in self._ports:
            url = f"{'https' if tls else 'http'}://{endpoint(settings.host, self._ports['http'].port)}"
            self._say(f"http {url}")
            if settings.status_page:
                self._say(f"status {url}/")

    def _serve_metrics(self) -> Callable[[], None]:
        """Returns the function that stops it."""
        host, number = addresses.beside(self.settings.host), self.settings.metrics_port
        if number < 0:
            return lambda: None
        hosts = bind(lambda: addresses.bindable(host), endpoint(host, number))
        metrics = self._metrics
        port = bind(lambda: MetricsPort(metrics.registry, hosts, number, None, metrics.text), endpoint(host, number))
        self._say(f"metrics http://{endpoint(host, port.port)}{PATH}")
        stop: Callable[[], None] = port.stop
        return stop

    async def _serve_health(self) -> Callable[[], Coroutine[Any, Any, None]]:
        """The port for probes, which is the supervisor's own. Returns what stops it."""

        async def nothing() -> None:
            pass

        settings, host = self.settings, addresses.beside(self.settings.host)
        if settings.health_port < 0:
            return nothing
        server = GrpcioServer(
            health_handlers(self._health), settings.max_message_bytes, settings.max_streams,
            settings.max_metadata_bytes, settings.max_connection_age, settings.max_bytes,
        )  # fmt: skip
        bound = bind(lambda: server.listen_health(host, settings.health_port), endpoint(host, settings.health_port))
        self._say(f"health {endpoint(host, bound)}")
        await server.start(lambda reason: (self._loop.call_soon_threadsafe(self._give_up, reason), None)[1])
        return partial(server.stop, 0.5)

    async def _watch(self) -> None:
        """Now and then, see that the ports still listen and connections are spread evenly."""
        while True:
            await asyncio.sleep(EVEN_SECONDS)
            for name, port in self._ports.items():
                if not port.works():
                    self._give_up(f"the {name} port serves no more")
                    return
            if len(self._keeper.ready()) == self._count:
                self._ports["grpc"].even_out()

    def _give_up(self, reason: str) -> None:
        self._lost = reason
        self._say(f"{reason}; the server exits, so that it can be restarted")
        self._stop.signalled()
        self._stop.signalled()

    # -- for the keeper -----------------------------------------------------------------------------------------------

    def _functions(self, process: WorkerProcess) -> Functions:
        """What a process may call."""
        return {
            "agree": partial(self._models.vote, process.number),
            "answer": self._answers.answer,
            "left": partial(self._take_report, process),
            "others": partial(self._others, process),
            "say": partial(self._said, process),
        }

    def _assignment(self, known: Known | None, complete: bool) -> Assignment:
        """`complete`: the server has started. Models that were asked for are then loaded by `_catch_up`."""
        settings, count = self.settings, self._count
        least = min(settings.max_bytes, settings.max_message_bytes)
        share = settings.model_copy(
            update={
                "processes": 1,
                "max_requests": max(1, settings.max_requests // count),
                "max_bytes": max(settings.max_bytes // count, least),
                "cpu_memory": max(1, (settings.cpu_memory or memory_limit() * 3 // 4) // count),
                "metrics_port": -1,
                "health_port": -1,
                "drain_wait": 0.0,
                "load_model": () if complete else settings.load_model,
            }
        )
        each = max(1, self._cores.count // count)
        why = f"{each} of {self._cores.count} for each of {count} processes ({self._cores.why})"
        http = self._ports.get("http")
        return Assignment(
            share, CpuBudget(each, why), self._ports["grpc"].port, http.port if http else 0, known, self._weights
        )

    async def _catch_up(self, process: WorkerProcess) -> None:
        """Make in a new process what was changed in the others since it read the repository."""
        process.channel.tell("serving", self._was_ready)
        settings = models = 0
        while not process.ended.is_set():
            settings = await self._answers.catch_up(process, settings)
            models = await self._models.catch_up(process, models)
            if (settings, models) == (self._answers.changes, self._models.changes):
                return  # nothing is awaited from here until it is a member

    def _ended(self, process: WorkerProcess) -> None:
        """Keep a process's counts, give others the connections that it did not receive, and wait for it no more."""
        for name, port in self._ports.items():
            for connection in process.ports[name].not_taken():
                port.hand(connection)
        process.close()
        self._models.ended(process.number)
        with self._metrics.lock:
            self._metrics.samples.end(process.number)
        self._statistics.end(process.number)
        if not process.leaving and not self._keeper.stopping.is_set():
            self._metrics.ends[process.cause] += 1

    def _said(self, process: WorkerProcess, line: str) -> None:
        """Print a process's line: all of the first one's, of others what only they have to say."""
        if line.startswith(OWN_LINES):
            return
        if self._keeper.first is process:
            self._say(line)
        elif not line.startswith("model ") or "NOT served" in line:
            self._say(f"process {process.pid}: {line}")

    def _is_ready(self) -> bool:
        keeper = self._keeper
        least = min(self.settings.min_processes, self._count)
        return keeper.complete and not keeper.stopping.is_set() and len(keeper.ready()) >= least

    def _changed(self) -> None:
        """Have every process know whether the server is ready."""
        ready, keeper = self._is_ready(), self._keeper
        if keeper.complete and not self._started:
            self._started = True
            if self.settings.model_control == "explicit":
                self._models.asked_for()
        for process in keeper.current():
            if process.joined.is_set() and process.serving != ready:
                process.serving = ready
                process.channel.tell("serving", ready)
        if ready != self._was_ready and not keeper.stopping.is_set():
            self._was_ready = ready
            if not ready:
                logger.error("the server is NOT ready: %d of %d processes are", len(keeper.ready()), self._count)
            elif self._said_ready:
                logger.warning("the server is ready again")
            else:
                self._said_ready = True
                self._say("ready")
        left = self._models.left()
        if left:
            self._begin(asyncio.to_thread(SharedWeights(self._weights).remove, left))
        self._health.changed()

    # -- reports ------------------------------------------------------------------------------------------------------

    async def _report_of(self, process: WorkerProcess) -> None:
        self._take_report(process, await process.channel.call("report", process.reported))

    def _take_report(self, process: WorkerProcess, report: Report) -> None:
        # One that was overtaken lacks what is known already; counts of a process that ended were put with the others'.
        if report.number <= process.reported or process.ended.is_set():
            return
        process.reported = report.number
        with self._metrics.lock:
            self._metrics.samples.take(process.number, report.samples)
        self._statistics.take(process.number, report.statistics)

    async def _refresh(self) -> None:
        """Have every process report now."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SCRAPE_SECONDS):
                reports = (self._report_of(process) for process in self._keeper.members())
                await asyncio.gather(*reports, return_exceptions=True)

    def _refresh_blocking(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            asyncio.run_coroutine_threadsafe(self._refresh(), self._loop).result(SCRAPE_SECONDS + 1.0)

    async def _others(self, asking: WorkerProcess) -> list[Any]:
        """What the status page shows of the other processes, for the one that is asked for the page."""
        calls = [
            asyncio.ensure_future(process.channel.call("status"))
            for process in self._keeper.members()
            if process is not asking
        ]
        if not calls:
            return []
        # A thread of the asking process waits for it, of which there are few: a process that hangs is left out.
        done, late = await asyncio.wait(calls, timeout=STATUS_SECONDS)
        for call in late:
            call.cancel()
        return [call.result() for call in done if call.exception() is None]

    def _pids(self) -> list[int]:
        return [os.getpid(), *(process.pid for process in list(self._keeper.all))]

    # -- the start and the end ----------------------------------------------------------------------------------------

    async def _start(self) -> bool:
        """Returns whether the server serves, or was stopped meanwhile; False: it can't serve, and said why."""
        started = asyncio.ensure_future(self._keeper.start())
        stopped = asyncio.ensure_future(self._stop.first.wait())
        await asyncio.wait((started, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not started.done():
            started.cancel()
            return True
        if not started.result():
            return False
        if not self._is_ready():
            missing = ", ".join(f"{view.name} {view.version}".rstrip() for view in self._models.missing())
            self._say(f"NOT ready: of {self._count} processes {len(self._keeper.ready())} are; missing: {missing}")
        if self.settings.model_control == "poll":
            self._begin(self._control.poll())
        return True

    async def _drain(self) -> None:
        self._control.stop()
        keeper, stop, wait = self._keeper, self._stop, self.settings.drain_wait
        was_ready = self._is_ready()
        keeper.stopping.set()
        self._changed()
        if wait and was_ready:
            self._say(f"draining: not ready, accepting calls for another {wait:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.second.wait(), wait)
        for port in self._ports.values():
            port.close()
        self._say(f"draining: {len(keeper.members())} processes, {self.settings.grace:g} s for requests in flight")
        await keeper.stop(stop.second)
        for _ in range(int(CLOSE_SECONDS / 0.05)):  # changes that wait for a process fail now that all have ended
            if self._control.close():
                break
            await asyncio.sleep(0.05)

    def _dump(self) -> None:
        for process in self._keeper.all:
            if process.joined.is_set():
                process.signal(signal.SIGUSR1)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
