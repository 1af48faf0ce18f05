"""What a dump comes to, in figures: for each model version its batches, why they closed, and its times."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from forwardpass.console.tables import table
from forwardpass.flight.dump_file import Dump, FlownBatch

HEADER = (
    "model",
    "batches",
    "requests",
    "not OK",
    "rows a batch",
    "queue p50",
    "p99",
    "run p50",
    "p99",
    "total p50",
    "p99",
)


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """One model version's figures. Times in seconds; those of requests are of the requests recorded one by one."""

    name: str
    batches: int
    requests: int
    failed: int
    rows: float  # a batch, on average
    queue: Sequence[float]
    run: Sequence[float]
    total: Sequence[float]
    closed: Counter[str]

    def row(self) -> list[str]:
        times = [span(quantile(values, q)) for values in (self.queue, self.run, self.total) for q in (0.5, 0.99)]
        return [self.name, str(self.batches), str(self.requests), str(self.failed), f"{self.rows:.1f}", *times]

    @property
    def reasons(self) -> str:
        return ", ".join(f"{name} {count / self.batches:.0%}" for name, count in self.closed.most_common())


def summaries(dump: Dump) -> list[ModelSummary]:
    """By model version, in the order of their names."""
    groups: dict[tuple[str, str], list[FlownBatch]] = {}
    for batch in dump.batches:
        groups.setdefault((batch.model, batch.version), []).append(batch)
    return [_summary(*key, groups[key]) for key in sorted(groups)]


def _summary(model: str, version: str, batches: Sequence[FlownBatch]) -> ModelSummary:
    each = [(batch, request) for batch in batches for request in batch.each]
    return ModelSummary(
        f"{model} {version}",
        len(batches),
        sum([b.requests for b in batches]),
        sum([b.requests - b.answered for b in batches]),
        sum([b.rows for b in batches]) / len(batches),
        [b.taken - r.arrival for b, r in each],
        [b.run for b in batches],
        [b.done - r.arrival for b, r in each],
        Counter(b.closed for b in batches),
    )


def headline(dump: Dump) -> str:
    """When, how long and why, on one line."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(dump.began + dump.span))
    requests = sum([b.requests for b in dump.batches])
    return (
        f"{len(dump.batches):,} batches, {requests:,} requests in the {span(dump.span)} before {when} UTC; "
        f"{dump.server}; written because of {dump.cause}"
    )


def as_text(dump: Dump) -> str:
    """For a terminal."""
    return "\n".join(_lines(dump)) + "\n"


def _lines(dump: Dump) -> Iterator[str]:
    yield headline(dump)
    found = summaries(dump)
    if found:
        yield ""
        yield table(HEADER, [one.row() for one in found], left=(0,))
        yield ""
        yield from (f"{one.name} closed: {one.reasons}" for one in found)
    refused = Counter[str]()
    for refusal in dump.refused:
        name = f"{refusal.model} {refusal.version}".strip() or "no model"
        refused[f"{name}: {refusal.reason}"] += refusal.requests
    if refused:
        yield ""
        yield from (f"not answered with success: {count:,} of {what}" for what, count in refused.most_common())


def quantile(values: Sequence[float], q: float) -> float:
    return float(np.quantile(values, q)) if values else 0.0


def span(seconds: float) -> str:
    """0.00123 as 1.23 ms."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.2g} µs"
