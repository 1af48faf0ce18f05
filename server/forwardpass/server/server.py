"""Start, ready, drain, stop, in a fixed order; signals; the watchdog.

start   ports listen (not ready) -> models load, off the event loop -> ready
        A signal ends a load between two runs; the server waits for it no longer than `grace`.
stop    SIGTERM or SIGINT -> not ready, still accepting for `drain_wait` seconds, while clients move elsewhere -> close
        the port, ask clients to connect elsewhere, take calls on their way -> reject new calls -> finish requests in
        flight, for `grace` seconds at most -> close the ports -> exit 0. A second signal ends the waits at once.
HUP     tokens, certificates and the repository are read again. USR1: stacks, models, counters on stderr, a flight dump
lost    a device failed for good, or a port no longer accepts -> not ready -> reject new and waiting requests -> close
        the ports -> exit 1, so that a supervisor restarts the process: nothing less brings the device or port back
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from forwardpass.api.health import Health
from forwardpass.batching.admission import Admission
from forwardpass.errors import RequestError
from forwardpass.execution import shared_arena
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.execution.memory_limit import memory_limit
from forwardpass.execution.ort_session import share_threads
from forwardpass.execution.providers import place
from forwardpass.inference.load_waits import LoadWaits
from forwardpass.inference.shared_memory import SharedMemoryRegions
from forwardpass.observability.access_log import AccessLog
from forwardpass.observability.model_metrics import LATENCY_BOUNDS, ModelMetrics
from forwardpass.observability.tracing import open_tracing
from forwardpass.repository.control import ModelControl
from forwardpass.repository.model_version import ModelVersion, VersionState
from forwardpass.repository.repository import Repository
from forwardpass.security.policy import SecurityConfig
from forwardpass.server import metrics_port
from forwardpass.server.endpoints import ACCOUNTS_SECONDS, Endpoints, Services, bind, serves_http
from forwardpass.server.flight_dumps import FlightDumps
from forwardpass.server.memory_trim import ArenaTrimmer, MemoryTrimmer
from forwardpass.server.metrics_port import MetricsSource
from forwardpass.server.process_group import GroupMember, ProcessGroup
from forwardpass.server.state_dump import log_state
from forwardpass.server.stop import Stop, signals
from forwardpass.settings import Settings
from forwardpass.status.page import StatusPage
from forwardpass.status.snapshot import ServerFacts, StatusSource
from forwardpass.transport import addresses
from forwardpass.transport.addresses import endpoint

logger = logging.getLogger(__name__)

# How long a thread may keep the interpreter while others wait for it. The default of 5 ms is longer than many a
# request; much less would interrupt threads in the middle of decoding a group of calls.
SWITCH_INTERVAL = 0.001

# Objects created and not yet freed that trigger Python's cycle collector. A request's objects are freed without it when
# it is answered; with the default of 700 those in flight alone trigger it, for 5 % of a small request's time.
COLLECT_AFTER = 50_000

# Seconds that traces get to be exported at the end, even where requests in flight took all of the grace.
LEAST_FLUSH = 0.5

# Seconds between checks for requests past their queue timeout, while every instance is busy with a long run.
QUEUE_TIMEOUT_LOOK = 0.1


class Server:
    """One server with all its objects, wired. `run` is its whole life."""

    def __init__(
        self,
        settings: Settings,
        cores: CpuBudget,
        say: Callable[[str], None] = print,
        group: ProcessGroup | None = None,
    ) -> None:
        """`group`: the processes that this one serves together with; None: it is alone."""
        self.settings = settings
        self._group = group
        self._cores = cores
        self._say = say
        self._accepting = False  # models were loaded, and the server is not stopping
        self._complete = not settings.strict  # every model that should serve has served at some time
        self.lost = ""  # the reason, once a device or a port has failed for good
        self._metrics_listen: Callable[[], bool] = lambda: True
        self._endpoints: Endpoints | None = None
        self.unfinished = False  # a load could not be stopped: the process must not wait for its thread
        place(settings.provider, 1, "")  # raises for a missing provider before anything is opened
        shared_arena.set_limit(settings.cpu_memory or memory_limit() * 3 // 4)
        self._admission = Admission(settings.max_requests, settings.max_bytes)
        self._metrics = ModelMetrics("", "")  # of requests without a model
        self._security = SecurityConfig(settings, addresses.is_loopback(settings.host))
        self._regions = SharedMemoryRegions(settings.max_bytes) if self._security.shared_memory else None
        self.repository = Repository(settings, cores, self._admission)
        self._access = AccessLog(settings.access_log) if settings.access_log else None
        self.repository.access = self._metrics.access = self._access
        self._tracing = open_tracing(settings.tracing, os.environ, LATENCY_BOUNDS, settings.trace_baggage)
        self.repository.tracing = self._metrics.tracing = self._tracing
        self._ends = 0.0  # when the grace of a stop is over, on the monotonic clock; 0: it has not begun
        self.flight = FlightDumps(settings, self.repository, self._metrics)
        self._scrape = MetricsSource(
            self.repository, self._admission, self._metrics, self._security, self._is_ready, ACCOUNTS_SECONDS
        )
        self._control = ModelControl(self.repository, settings)
        loads = self._scrape.on_demand = self._control.on_demand
        self._waits = None if loads is None else LoadWaits(loads, self._admission)
        self._background: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Serve until a signal. Returns the exit status. Raises SettingsError if the server can't start."""
        sys.setswitchinterval(SWITCH_INTERVAL)
        health = Health(self.repository, self._is_ready, lambda: self._accepting)
        loop = asyncio.get_running_loop()

        def changed() -> None:
            with contextlib.suppress(RuntimeError):  # a load may end after the loop did
                loop.call_soon_threadsafe(self._changed, health)

        self.repository.changed = changed
        stop = Stop()

        def lost(reason: str) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._give_up, reason, stop)

        self.repository.lost = lost
        if self.settings.intra_op_threads > 1:
            share_threads(self.settings.intra_op_threads)
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(
                signals(
                    stop, lambda: self._begin(self._read_again()), lambda: self._begin(asyncio.to_thread(self._dump))
                )
            )
            entries = self.repository.discover()
            if self.repository.loads_on_demand:
                idle = sum(not entry.asked_for for entry in self.repository.entries())
                self._say(f"{idle} models are loaded once they are asked for")
            status = self._status_source()
            page = StatusPage(status, self.repository, self._security.tokens) if self.settings.status_page else None
            on_http = serves_http(self.settings)
            services = self._services(health)
            endpoints = Endpoints(self.settings, services, lost, page if on_http else None, self._group)
            stack.push_async_callback(endpoints.close)
            await endpoints.open(self._say)
            self._endpoints = endpoints
            if self._group is not None:
                self._group.join(
                    GroupMember(
                        self.repository, self._scrape.collect, status.own, endpoints.part_with,
                        lambda: self._changed(health),
                    )
                )  # fmt: skip
            stop_metrics = self._serve_metrics(None if on_http else page)
            if self._access is not None:
                self._access.start()
            if self._tracing is not None:
                self._tracing.start()
            over = threading.Event()
            threading.Thread(target=self._watch, args=(over, lost), name="watchdog", daemon=True).start()
            try:
                if await self._load(entries, stop):
                    gc.collect()
                    gc.freeze()  # objects made until now stay: exempt them from collections
                    gc.set_threshold(COLLECT_AFTER)
                    self._accepting = True
                    if self._complete:
                        self._say("ready")
                    self._changed(health)
                    if not self._complete:
                        missing = ", ".join(f"{e.name} {e.version}".rstrip() for e in self.repository.missing())
                        self._say(f"NOT ready, with --strict, until every model serves: {missing} do not")
                    if self.settings.model_control in ("poll", "on-demand") and self._group is None:
                        self._begin(self._control.poll())
                    await stop.first.wait()
                elif not stop.first.is_set():
                    self._say("no model could be loaded")
                    return 1
                return await self._drain(health, endpoints, stop)
            finally:
                over.set()
                for task in self._background:
                    task.cancel()
                self.unfinished |= not self._control.close()
                stop_metrics()
                self.flight.close()
                if self._access is not None:
                    self._access.close()
                if self._tracing is not None:
                    self._tracing.close(max(self._ends - time.monotonic(), LEAST_FLUSH))

    def _services(self, health: Health) -> Services:
        return Services(
            repository=self.repository,
            control=self._control,
            admission=self._admission,
            waits=self._waits,
            metrics=self._metrics,
            security=self._security,
            regions=self._regions,
            health=health,
            is_ready=self._is_ready,
            flight=self.flight.dump,
        )

    def _serve_metrics(self, page: StatusPage | None) -> Callable[[], None]:
        """Listen for scrapes, and for viewers of `page`. Returns the function that stops it."""
        host, port = self.settings.host, self.settings.metrics_port
        if port < 0:
            return lambda: None
        where = bind(lambda: addresses.bindable(addresses.beside(host)), endpoint(host, port))
        source = self._scrape
        listener = bind(
            lambda: metrics_port.MetricsPort(source.registry, where, port, page, source.text), endpoint(host, port)
        )
        self._metrics_listen = listener.accepts
        url = f"http://{endpoint(addresses.beside(host), listener.port)}"
        self._say(f"metrics {url}{metrics_port.PATH}")
        if page is not None:
            self._say(f"status {url}/")
        stop: Callable[[], None] = listener.stop
        return stop

    def _status_source(self) -> StatusSource:
        facts = ServerFacts(self._is_ready, self._cores, infer=serves_http(self.settings))
        others = (lambda: ()) if self._group is None else self._group.others
        return StatusSource(self.repository, self._admission, self._metrics, facts, others=others)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the background, until the server ends at most."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _read_again(self) -> None:
        """On SIGHUP: read again what can be read again, and print the outcome."""
        found = await asyncio.to_thread(self._security.read_again)
        for what, reason in found.items():
            self._say(f"SIGHUP: {what}: {f'NOT in use, the last good ones stay: {reason}' if reason else 'in use'}")
        try:
            self._say(f"SIGHUP: repository: {await self._control.again()}")
        except RequestError as error:
            self._say(f"SIGHUP: repository: models stay as they are: {error}")

    def _dump(self) -> None:
        """On SIGUSR1: log the server's state. The threads' stacks are written before this. Blocks."""
        log_state(self.repository, self._scrape.registry)
        self.flight.write("SIGUSR1")

    def _is_ready(self) -> bool:
        return self._accepting and self._complete and (self._group is None or self._group.ready)

    def _changed(self, health: Health) -> None:
        """Handle a change of the models, or of whether the server accepts calls."""
        if self._accepting and not self._complete and not self.repository.missing():
            # Stays set: all replicas read the same folder, and a model that fails later must not take all of them out.
            self._complete = True
            self._say("ready")
        if self._group is not None:
            self._group.changed(self._accepting, self._complete)
        health.changed()

    async def _load(self, entries: list[ModelVersion], stop: Stop) -> bool:
        """Load every model and print its outcome. Returns whether any is or may be served; False if stopped."""
        stopped = asyncio.ensure_future(stop.first.wait())

        async def load(entry: ModelVersion) -> bool:
            loaded = await self._control.start(entry)
            self._say(_report(loaded))
            return loaded.state is VersionState.READY

        loads = asyncio.gather(*map(load, entries))
        await asyncio.wait((loads, stopped), return_when=asyncio.FIRST_COMPLETED)
        if stopped.done():
            loads.cancel()
            with contextlib.suppress(asyncio.CancelledError, RequestError):
                await loads
            return False
        stopped.cancel()
        return self.settings.model_control != "none" or any(loads.result())

    def _watch(self, over: threading.Event, lost: Callable[[str], None]) -> None:
        """End runs longer than `run_timeout`, reject requests past their queue timeout, give freed memory back, and
        check that /metrics is served (the gRPC ports watch themselves). Runs on a thread, since a run may hold up the
        event loop."""
        limit = self.settings.run_timeout
        nap = QUEUE_TIMEOUT_LOOK
        memory, arena = MemoryTrimmer(), ArenaTrimmer(shared_arena.shrink)
        while not over.wait(nap):
            nap = min(1.0, limit / 4)
            memory.look(time.monotonic())
            arena.look(time.monotonic())
            if not self._metrics_listen():
                lost("the metrics port serves no more")
            if self._endpoints is not None and not self._endpoints.accepts():
                lost("the HTTP port serves no more")
            for worker in self.repository.workers():
                if worker.has_timeouts:
                    worker.reject_timed_out()
                    nap = min(nap, QUEUE_TIMEOUT_LOOK)
                ended = worker.end_runs_since(time.monotonic() - limit)
                if ended:
                    logger.warning("model %s: ended %d run(s) of more than %g s", worker.name, ended, limit)

    def _give_up(self, reason: str, stop: Stop) -> None:
        """Stop as after two signals, and print the reason. Waiting requests are rejected at once, to go elsewhere."""
        if self.lost:
            return
        self.lost = reason
        self._say(f"{reason}; the server exits, so that it can be restarted")
        self.flight.write_at_end(reason)
        stop.signalled()
        stop.signalled()

    async def _drain(self, health: Health, endpoints: Endpoints, stop: Stop) -> int:
        self._control.stop()
        was_accepting, self._accepting = self._accepting, False
        self._changed(health)
        wait = self.settings.drain_wait
        if was_accepting and wait:  # one that never accepted calls has no clients
            self._say(f"draining: not ready, accepting calls for another {wait:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.second.wait(), wait)
        self._ends = deadline = time.monotonic() + self.settings.grace
        await endpoints.drain(deadline, stop.second)
        self._admission.close()
        self._say(f"draining: {self._admission.requests} requests in flight, {self.settings.grace:g} s for them")
        while self._admission.requests and time.monotonic() < deadline and not stop.second.is_set():
            await asyncio.to_thread(self._admission.wait_empty, 0.05)
        while not self._control.close() and time.monotonic() < deadline and not stop.second.is_set():
            await asyncio.to_thread(self._control.close, 0.05)
        left = max(0.0, deadline - time.monotonic()) if not stop.second.is_set() else 0.0
        await asyncio.to_thread(self.repository.close, min(left, 1.0) if not self._admission.requests else 0.0)
        health.end()
        # Responses that were just passed to the transports are still on their way out.
        await asyncio.sleep(0.05)
        await endpoints.close(min(left, 0.5))
        # No client waits for these runs any more, and one that is still in native code while the interpreter ends
        # aborts the process.
        for worker in self.repository.workers():
            worker.end_runs_since(float("inf"))
        await asyncio.to_thread(self.repository.close, 2.0)
        if not self._control.close():
            self._say(
                "a model is still being loaded, in a step that cannot be interrupted; the process ends without it"
            )
        if self._group is not None:
            await self._group.leave()
        self._say("stopped")
        return 1 if self.lost else 0


def _report(entry: ModelVersion) -> str:
    """The outcome of loading one model, on one line."""
    if entry.loaded is None:
        return f"model {entry.name} version {entry.version}: NOT served: {entry.reason}"
    worker, placement = entry.loaded.worker, entry.loaded.placement
    rows, instances = worker.run_rows, worker.options.instances
    verdict = entry.loaded.invariance.value
    batching = f"batches of up to {rows} rows" if entry.loaded.batches else "one request at a time"
    return (
        f"model {entry.name} version {entry.version}: {batching} ({verdict}: {entry.loaded.why}); "
        f"{placement.label}, {instances} instance(s) of {placement.threads} thread(s) ({placement.why}); "
        f"loaded in {entry.loaded.seconds:.2f} s"
    )
