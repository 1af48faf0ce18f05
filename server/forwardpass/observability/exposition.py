"""A scrape as text, in Prometheus' format and in OpenMetrics'. Quick where most of what is shown did not change.

prometheus_client makes an object of every sample and formats each anew: with a thousand models seconds, in which the
requests of all wait for the interpreter. Here a model's lines are made once and kept until one of its counts changes.
What either library gives for the same samples is the same, byte for byte, which a test holds.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Final

from prometheus_client.utils import floatToGoString

from forwardpass.observability.catalogue import METRICS, Metric, SampleSink
from forwardpass.observability.histogram import Exemplar, Histogram

_in_go: Callable[[float], str] = floatToGoString
Lines = dict[Metric, str]  # of some metrics, each with all of its lines

STINT: Final = 2e-4  # seconds that the interpreter is kept before others get it
PAUSE: Final = 2e-5  # seconds; less would be given back before another thread wakes up


class Pacer:
    """Leaves the interpreter to other threads, often and for a moment. Python itself would make them wait for long."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter, sleep: Callable[[float], object] = time.sleep):
        self._clock = clock
        self._sleep = sleep
        self._since = clock()

    def pause(self) -> None:
        """Called often, between two pieces of work."""
        if self._clock() - self._since >= STINT:
            self._sleep(PAUSE)
            self._since = self._clock()


class Exposition:
    """Makes a text at each scrape. Not thread-safe: scrapes take turns."""

    def __init__(self, source: Callable[[SampleSink], object], pacer: Callable[[], Pacer] = Pacer) -> None:
        """`source` adds all samples."""
        self._source = source
        self._pacer = pacer
        self._parts: dict[Hashable, tuple[Hashable, Lines]] = {}

    def text(self, openmetrics: bool = False) -> Iterator[bytes]:
        """The metrics, one at a time, without OpenMetrics' end."""
        pacer = self._pacer()
        samples = TextSamples(self._parts, pacer, openmetrics)
        self._source(samples)
        self._parts = {} if openmetrics and samples.has_exemplars else samples.parts
        for metric, lines in samples.lines.items():
            yield "".join((_head(metric, openmetrics), *lines)).encode()
            pacer.pause()


class TextSamples(SampleSink):
    """The lines of one scrape."""

    def __init__(self, known: dict[Hashable, tuple[Hashable, Lines]], pacer: Pacer, openmetrics: bool) -> None:
        """`known`: the parts of the scrape before."""
        self.lines: dict[Metric, list[str]] = {metric: [] for metric in METRICS}
        self.parts: dict[Hashable, tuple[Hashable, Lines]] = {}
        self.has_exemplars = False
        self._known = known
        self._pacer = pacer
        self._openmetrics = openmetrics

    def part(self, key: Hashable, changes: Hashable | None, fill: Callable[[SampleSink], object]) -> None:
        known = self._known.get(key)
        if changes is not None and known is not None and known[0] == changes:
            made = known[1]
        else:
            mine = TextSamples({}, self._pacer, self._openmetrics)
            fill(mine)
            self.has_exemplars |= mine.has_exemplars
            made = {metric: "".join(lines) for metric, lines in mine.lines.items() if lines}
        self.parts[key] = (changes, made)
        for metric, text in made.items():
            self.lines[metric].append(text)
        self._pacer.pause()

    def add(self, metric: Metric, labels: Sequence[str], value: float) -> None:
        inside = ",".join(_pairs(metric, labels))
        self.lines[metric].append(f"{metric.name}{f'{{{inside}}}' if inside else ''} {_number(value)}\n")

    def add_histogram(
        self, metric: Metric, labels: Sequence[str], histogram: Histogram, exemplars: Sequence[Exemplar | None] = ()
    ) -> None:
        pairs = _pairs(metric, labels)
        name, around = metric.name, "".join(f",{pair}" for pair in pairs if pair > "le")
        before = "".join(f"{pair}," for pair in pairs if pair < "le")
        lines = [
            f'{name}_bucket{{{before}le="{bound}"{around}}} {_number(count)}' for bound, count in histogram.buckets()
        ]
        if self._openmetrics:
            for place, exemplar in enumerate(exemplars):
                if exemplar is not None:
                    self.has_exemplars = True
                    lines[place] += _example(exemplar)
        inside = f"{{{','.join(pairs)}}}" if pairs else ""
        lines += [
            f"{name}_count{inside} {_number(histogram.count)}",
            f"{name}_sum{inside} {_number(histogram.total)}\n",
        ]
        self.lines[metric].append("\n".join(lines))


@functools.lru_cache(maxsize=2 * len(METRICS))
def _head(metric: Metric, openmetrics: bool) -> str:
    name = metric.name.removesuffix("_total") if openmetrics and metric.kind == "counter" else metric.name
    meaning = metric.meaning.replace("\\", r"\\").replace("\n", r"\n")
    if openmetrics:
        meaning = meaning.replace('"', r"\"")
    return f"# HELP {name} {meaning}\n# TYPE {name} {metric.kind}\n"


def _number(value: float) -> str:
    return f"{value}.0" if isinstance(value, int) and 0 <= value < 1_000_000 else _in_go(value)


def _pairs(metric: Metric, labels: Sequence[str]) -> list[str]:
    """NAME="VALUE" of each label, by name."""
    return sorted([f'{name}="{_escaped(value)}"' for name, value in zip(metric.labels, labels, strict=True)])


def _escaped(value: str) -> str:
    if "\\" in value or "\n" in value or '"' in value:
        return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return value


def _example(exemplar: Exemplar) -> str:
    ids = f'span_id="{_escaped(exemplar.span_id)}",trace_id="{_escaped(exemplar.trace_id)}"'
    return f" # {{{ids}}} {_number(exemplar.value)} {exemplar.timestamp}"
