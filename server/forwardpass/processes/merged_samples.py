"""The metrics of several processes as those of one server: recorded in each, sent as far as they changed, added up.

Counts outlive the process that made them, up to its last report.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

from forwardpass.observability.catalogue import METRICS, READY, Metric, SampleSink
from forwardpass.observability.histogram import Exemplar, Histogram

# By name. Whether the whole server is ready, only the supervisor knows.
_METRICS = {metric.name: metric for metric in METRICS if metric is not READY}


class ValueSample(NamedTuple):
    """One counter or gauge."""

    metric: str  # its name: while processes are replaced, some may be of another version of this package
    labels: tuple[str, ...]
    value: float


class HistogramSample(NamedTuple):
    """One histogram."""

    metric: str
    labels: tuple[str, ...]
    bounds: Sequence[float]
    counts: tuple[int, ...]
    total: float


Samples = Sequence[ValueSample | HistogramSample]
Parts = dict[Hashable, Samples | None]  # None: as in the report before


class SampleRecorder(SampleSink):
    """Records what a scrape adds. `report` after each scrape. Exemplars are left out."""

    def __init__(self) -> None:
        self._sent: dict[Hashable, Hashable] = {}  # by part: its changes when it was reported
        self._parts: Parts = {}
        self._seen: dict[Hashable, Hashable] = {}
        self._rest: list[ValueSample | HistogramSample] = []

    def forget(self) -> None:
        """The last report did not arrive: the next one must have every part. Called before a scrape."""
        self._sent = {}

    def report(self) -> Parts:
        """What was added since the last report, by part."""
        parts, self._parts = self._parts, {}
        parts[""], self._rest = self._rest, []
        self._sent, self._seen = self._seen, {}
        return parts

    def part(self, key: Hashable, changes: Hashable | None, fill: Callable[[SampleSink], object]) -> None:
        if changes is not None:
            self._seen[key] = changes
            if self._sent.get(key) == changes:
                self._parts[key] = None
                return
        outer, self._rest = self._rest, []
        fill(self)
        self._parts[key], self._rest = self._rest, outer

    def add(self, metric: Metric, labels: Sequence[str], value: float) -> None:
        self._rest.append(ValueSample(metric.name, tuple(labels), value))

    def add_histogram(
        self,
        metric: Metric,
        labels: Sequence[str],
        histogram: Histogram,
        exemplars: Sequence[Exemplar | None] = (),  # noqa: ARG002
    ) -> None:
        self._rest.append(
            HistogramSample(
                metric.name, tuple(labels), tuple(histogram.bounds), tuple(histogram.counts), histogram.total
            )
        )


class ProcessSamples:
    """What one process has reported, whole."""

    def __init__(self) -> None:
        self.parts: dict[Hashable, Samples] = {}
        self.versions: dict[Hashable, int] = {}  # of each part: the report that it came with
        self._reports = 0

    def take(self, report: Parts) -> None:
        self._reports += 1
        parts: dict[Hashable, Samples] = {}
        for key, samples in report.items():
            if samples is None:
                parts[key] = self.parts[key]
            else:
                parts[key] = [s for s in samples if s.metric in _METRICS]
                self.versions[key] = self._reports
        self.parts = parts


class MergedSamples:
    """The samples of all processes together. Not thread-safe."""

    def __init__(self) -> None:
        self.processes: dict[int, ProcessSamples] = {}  # by a number that is never used again
        self._ended: dict[Hashable, Samples] = {}
        self._ends = 0

    def take(self, process: int, report: Parts) -> None:
        self.processes.setdefault(process, ProcessSamples()).take(report)

    def end(self, process: int) -> None:
        """A process has ended: its counts stay, its gauges go."""
        ended = self.processes.pop(process, None)
        if ended is None:
            return
        self._ends += 1
        for key, samples in ended.parts.items():
            counts = [s for s in samples if _METRICS[s.metric].kind != "gauge"]
            self._ended[key] = merged((self._ended.get(key, ()), counts))

    def collect(self, sink: SampleSink) -> None:
        """Add all of it to a scrape. What no process has any more is left out, as if it had been one process."""
        live = self.processes
        keys: dict[Hashable, None] = {key: None for process in live.values() for key in process.parts}
        for key in keys or self._ended:
            versions = tuple((number, process.versions.get(key)) for number, process in live.items())
            sources = [self._ended.get(key, ()), *(process.parts.get(key, ()) for process in live.values())]

            def fill(part: SampleSink, sources: list[Samples] = sources) -> None:
                for sample in merged(sources):
                    _add(part, sample)

            sink.part(key, (self._ends, versions), fill)


def merged(sources: Iterable[Samples]) -> Samples:
    """The samples of several sources, those of the same metric and labels as one."""
    found: dict[tuple[str, tuple[str, ...]], ValueSample | HistogramSample] = {}
    for samples in sources:
        for sample in samples:
            key = (sample.metric, sample.labels)
            before = found.get(key)
            found[key] = sample if before is None else _together(before, sample)
    return list(found.values())


def _together(
    one: ValueSample | HistogramSample, other: ValueSample | HistogramSample
) -> ValueSample | HistogramSample:
    if isinstance(one, ValueSample) and isinstance(other, ValueSample):
        is_sum = _METRICS[one.metric].together == "sum"
        return one._replace(value=one.value + other.value if is_sum else max(one.value, other.value))
    assert isinstance(one, HistogramSample)
    assert isinstance(other, HistogramSample)
    if one.bounds != other.bounds:  # of another version of this package, while it is being replaced
        return other
    counts = tuple(a + b for a, b in zip(one.counts, other.counts, strict=True))
    return one._replace(counts=counts, total=one.total + other.total)


def _add(sink: SampleSink, sample: ValueSample | HistogramSample) -> None:
    metric = _METRICS[sample.metric]
    if isinstance(sample, ValueSample):
        sink.add(metric, sample.labels, sample.value)
        return
    histogram = Histogram(sample.bounds)
    histogram.counts, histogram.total = list(sample.counts), sample.total
    sink.add_histogram(metric, sample.labels, histogram)
