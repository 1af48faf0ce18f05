"""One server under test: its requests, its metrics, and measurements at a given load."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forwardpass.client import PLAIN, Access
from forwardpass.errors import LoadTestError
from forwardpass.loadtest import measurement, request_bodies, server_metrics
from forwardpass.loadtest.generator import fleet, histogram, schedule
from forwardpass.loadtest.generator.client_process import ProcessPlan
from forwardpass.loadtest.generator.recording import Recording
from forwardpass.loadtest.measurement import Measurement, OfferedLoad, ms

PER_PROCESS = 15_000.0  # requests/s of single rows assigned to one client process: half of its capacity
DEFAULT_METRICS_PORT = 8002  # of Forwardpass and of Triton
_SLICES = 100


@dataclass(frozen=True, slots=True)
class LoadClient:
    """Load generator settings that do not depend on the rate. Times in seconds."""

    arrivals: schedule.Arrivals = "poisson"
    connections: int = 8  # per process
    processes: int = 0  # 0: as many as the rate needs and the machine has cores for
    core: int | None = None  # pin the first process to this core, the others to the following ones
    deadline: float | None = None
    warm_up: float = 1.0
    patience: float = 2.0
    seed: int = 0
    progress: bool = False
    access: Access = PLAIN


class LoadTarget:
    """A server and the requests sent to it. Raises CallError if it does not answer them."""

    def __init__(
        self,
        address: str,
        model: str,
        requests: request_bodies.Requests,
        client: LoadClient,
        *,
        name: str = "",
        metrics_url: str | None = None,
        verify: bool = False,
    ) -> None:
        """`metrics_url` None: the default metrics port of Forwardpass and Triton; empty: metrics are not read."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise LoadTestError(f"expected HOST:PORT, got {address!r}")
        self.address, self.model, self.client = address, model, client
        self.name = name or address
        self.host, self.port = host.strip("[]"), int(port)
        self.requests = requests
        answers = request_bodies.answers(address, requests, verify, client.access)
        self._expected = answers if verify else ()
        self._metadata = client.access.metadata(address)
        self.metrics_url = f"http://{host}:{DEFAULT_METRICS_PORT}/metrics" if metrics_url is None else metrics_url
        self._runs = 0

    def at_rate(self, rate: float, seconds: float) -> Measurement:
        """An open loop at a steady rate."""
        return self.phases([schedule.Phase(seconds, rate, rate)])

    def phases(self, phases: Sequence[schedule.Phase]) -> Measurement:
        """An open loop whose rate follows the phases."""
        seconds = sum(phase.seconds for phase in phases)
        rate = sum(phase.requests for phase in phases) / seconds
        highest = max(max(phase.begin, phase.end) for phase in phases)
        return self._measure(rate, 0, seconds, phases, highest)

    def closed(self, in_flight: int, seconds: float) -> Measurement:
        """A closed loop: `in_flight` calls at a time, each started when another ends."""
        return self._measure(0.0, in_flight, seconds, (), 0.0)

    def _measure(
        self, rate: float, in_flight: int, seconds: float, phases: Sequence[schedule.Phase], highest: float
    ) -> Measurement:
        client = self.client
        offer = OfferedLoad(
            self.name,
            self.model,
            rate,
            in_flight,
            seconds,
            client.arrivals,
            self.requests.mean_rows,
            client.deadline,
        )
        self._runs += 1
        order = ProcessPlan(
            self.host,
            self.port,
            request_bodies.PATH,
            self.requests.messages,
            self.requests.weights,
            seconds,
            client.warm_up,
            phases,
            client.arrivals,
            in_flight,
            client.connections,
            client.deadline,
            client.patience,
            self._expected,
            seed=client.seed * 1_000_003 + self._runs,
            slices=_SLICES,
            core=client.core,
            tls=client.access.tls,
            metadata=self._metadata,
        )
        before: list[Any] = []
        with contextlib.ExitStack() as stack:
            is_watched = client.progress and sys.stderr.isatty()
            look = stack.enter_context(_Progress(offer)) if is_watched else None
            finished = fleet.run(
                order,
                self._processes(highest),
                None if look is None else look.show,
                lambda: before.append(server_metrics.scrape(self.metrics_url)),
            )
        after = server_metrics.scrape(self.metrics_url)
        return measurement.of(offer, finished, server_metrics.window(before[0], after, self.model))

    def _processes(self, highest: float) -> int:
        if self.client.processes:
            return self.client.processes
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(cores - 1, int(highest / PER_PROCESS) + 1))


class _Progress:
    """A progress bar on stderr with the figures of the last second. Used only on a terminal.

    Computes from that second's counts alone: the processes that generate the load may need the core.
    """

    def __init__(self, offer: OfferedLoad) -> None:
        self._offer = offer

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def show(self, seconds: float, recordings: Sequence[Recording]) -> None:
        """Show the counts as of `seconds` after recording began."""
        if seconds < 0:
            return
        slice_ = self._offer.seconds / _SLICES
        end = min(_SLICES, int(seconds / slice_))
        begin = max(0, end - max(1, round(1.0 / slice_)))
        recent = sum((r.latency[begin:end].sum(axis=0) for r in recordings), np.zeros(histogram.BUCKETS, np.int64))
        failed = sum(r.failed for r in recordings)
        share = min(1.0, seconds / self._offer.seconds)
        bar = "█" * round(24 * share) + "·" * (24 - round(24 * share))
        text = (
            f"{bar} {share:4.0%}  {recent.sum() / max((end - begin) * slice_, 1e-9):,.0f}/s  "
            f"p50 {ms(histogram.quantile(recent, 0.5))}  p99 {ms(histogram.quantile(recent, 0.99))}"
            + (f"  {failed:,} failed" if failed else "")
        )
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
