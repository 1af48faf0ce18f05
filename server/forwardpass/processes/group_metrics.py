"""/metrics of all processes together, and of the supervisor."""

from __future__ import annotations

import functools
import resource
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import Metric as MetricFamily
from prometheus_client.openmetrics import exposition as openmetrics_format
from prometheus_client.registry import Collector

from forwardpass.observability import catalogue
from forwardpass.observability.catalogue import Exporter, SampleSink
from forwardpass.observability.exposition import Exposition
from forwardpass.processes.merged_samples import MergedSamples

STATES = ("ready", "starting", "draining")
CAUSES = ("SIGKILL", "SIGSEGV", "exited", "hung")  # shown as 0 before they occur: the first is an increase then


class GroupMetrics:
    """Makes a scrape's text. Thread-safe: scrapes take turns with each other and with reports."""

    def __init__(self, refresh: Callable[[], None], states: Callable[[], list[str]], pids: Callable[[], list[int]]):
        """`refresh` has every process report, and blocks; `states`: of the processes; `pids`: theirs and one's own."""
        self.samples = MergedSamples()
        self.lock = threading.Lock()  # of `samples`
        self.ends: Counter[str] = Counter()  # of processes that were not asked to end, by cause
        self.ready: Callable[[], bool] = lambda: False
        self._refresh = refresh
        self._states = states
        self.registry = CollectorRegistry()
        self.registry.register(Exporter(self._collect_anew))
        self._process = CollectorRegistry()
        processes = _Processes(pids)
        self._process.register(processes)
        self.registry.register(processes)
        self._exposition = Exposition(self._collect)
        self._turn = threading.Lock()

    def text(self, openmetrics: bool) -> bytes:
        """The metrics of the whole server, in OpenMetrics' format or in Prometheus'."""
        with self._turn:
            self._refresh()
            parts = list(self._exposition.text(openmetrics))
        generate = openmetrics_format.generate_latest if openmetrics else generate_latest
        return b"".join((*parts, generate(self._process)))

    def _collect_anew(self, samples: SampleSink) -> None:
        with self._turn:
            self._refresh()
            self._collect(samples)

    def _collect(self, samples: SampleSink) -> None:
        with self.lock:
            self.samples.collect(samples)
        states = Counter(self._states())
        for state in STATES:
            samples.add(catalogue.PROCESSES, (state,), states[state])
        for cause in dict.fromkeys((*CAUSES, *self.ends)):
            samples.add(catalogue.PROCESS_ENDS_TOTAL, (cause,), self.ends[cause])
        samples.add(catalogue.READY, (), int(self.ready()))


class _Processes(Collector):
    """process_* of several processes: sums, and the start of the first. Seconds of CPU include those of processes that
    have ended, so that they never decrease."""

    def __init__(self, pids: Callable[[], list[int]]) -> None:
        self._pids = pids
        self._seconds = 0.0  # the most that was shown: one that ends meanwhile is not in either count

    def describe(self) -> Iterable[MetricFamily]:
        return ProcessCollector(registry=None).collect()

    def collect(self) -> Iterator[MetricFamily]:
        total: dict[str, MetricFamily] = {}
        children = resource.getrusage(resource.RUSAGE_CHILDREN)  # that have ended
        for pid in self._pids():
            for family in ProcessCollector(pid=functools.partial(int, pid), registry=None).collect():
                known = total.setdefault(family.name, family)
                if known is family:
                    continue
                combine = min if family.name.endswith("start_time_seconds") else sum
                known.samples = [
                    one._replace(value=combine((one.value, other.value)))
                    for one, other in zip(known.samples, family.samples, strict=True)
                ]
        cpu = total.get("process_cpu_seconds")
        if cpu is not None:
            seconds = cpu.samples[0].value + children.ru_utime + children.ru_stime
            self._seconds = max(self._seconds, seconds)
            cpu.samples = [cpu.samples[0]._replace(value=self._seconds)]
        yield from total.values()
