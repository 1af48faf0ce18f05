"""One measurement as figures: offered load, outcomes, latencies, and whether the client was saturated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from forwardpass.loadtest.generator import histogram
from forwardpass.loadtest.generator.fleet import Finished
from forwardpass.loadtest.generator.recording import OUTCOME_NAMES, Recording

QUANTILES: Final = (0.5, 0.9, 0.95, 0.99, 0.999, 0.9999)

# The client counts as saturated when its own lag exceeds a share of the latency it measured, or it was hardly ever
# idle. A lag below the floor is the machine's timer resolution, whatever its share.
LAG_SHARE: Final = 0.1
LAG_FLOOR: Final = 100e-6  # seconds
BUSY: Final = 0.95
BUSY_ENOUGH: Final = 0.8  # a client that sends late though less busy than this was preempted


@dataclass(frozen=True, slots=True)
class OfferedLoad:
    """The load to offer. Exactly one of `rate` (requests/s, the mean over the time) and `in_flight` is not 0."""

    target: str
    model: str
    rate: float
    in_flight: int
    seconds: float
    arrivals: str
    mean_rows: float
    deadline: float | None = None  # seconds

    @property
    def open_loop(self) -> bool:
        return self.in_flight == 0


@dataclass(frozen=True, slots=True)
class Measurement:
    """The result of an offered load. Latencies in seconds, of OK responses, from when the request was due."""

    offer: OfferedLoad
    recording: Recording
    busy: float  # the busiest client process: share of its time not idle
    cpu: float  # CPU seconds a second, all client processes
    held: int  # the most calls at a time that one connection held back: flow control or the stream limit
    examples: Mapping[str, str] = field(default_factory=dict)
    server: Mapping[str, Any] | None = None  # the server's metrics over the same time

    @property
    def requests(self) -> int:
        return self.recording.ok + self.recording.failed

    @property
    def throughput(self) -> float:
        """OK responses a second."""
        return self.recording.ok / self.offer.seconds

    @property
    def answered_late(self) -> float:
        """OK responses a second received in the second half of the time: under overload, the maximum throughput."""
        recording, seconds = self.recording, self.offer.seconds
        count = 0
        for place, counts in enumerate(recording.latency):
            due = (place + 0.5) * seconds / recording.slices
            came = due + histogram.MIDDLES
            count += int(counts[(came >= seconds / 2) & (came < seconds)].sum())
        return count / (seconds / 2)

    @property
    def goodput(self) -> float:
        """OK responses within the deadline, a second; all OK responses if there is no deadline."""
        deadline = self.offer.deadline
        if deadline is None:
            return self.throughput
        return (
            histogram.share_within(self.recording.total_latency, deadline) * self.throughput
            if self.recording.ok
            else 0.0
        )

    @property
    def errors(self) -> float:
        """The share of requests without an OK response."""
        return self.recording.failed / self.requests if self.requests else 0.0

    def quantile(self, q: float, *, of_all: bool = False) -> float:
        """Latency quantile in seconds; `of_all`: failed requests count as infinitely late."""
        failed = self.recording.failed if of_all else 0
        return histogram.quantile(self.recording.total_latency, q, failed)

    def lag(self, q: float) -> float:
        """Quantile of the client's own delay in sending requests that are due, in seconds; nan in a closed loop."""
        return histogram.quantile(self.recording.lag, q)

    @property
    def saturation(self) -> list[str]:
        """The reasons why these figures show the client's limit rather than the server's; empty if they do not."""
        found = []
        lag, latency = self.lag(0.99), self.quantile(0.99)
        if not math.isnan(lag) and lag > LAG_FLOOR and not lag <= LAG_SHARE * latency:
            why = "it has too much to do" if self.busy > BUSY_ENOUGH else "its core had other work"
            found.append(
                f"it sent late: 1 % of the requests by {ms(lag)} or more, which is {lag / latency:.0%} of the p99 that "
                f"it measured (at most {LAG_SHARE:.0%}); busy for {self.busy:.0%} of the time: {why}"
            )
        if self.offer.open_loop and self.busy > BUSY:
            found.append(f"it had something to do for {self.busy:.0%} of the time (at most {BUSY:.0%})")
        return found

    def as_json(self) -> dict[str, Any]:
        offer, counts = self.offer, self.recording.total_latency
        return {
            "target": offer.target,
            "model": offer.model,
            "loop": "open" if offer.open_loop else "closed",
            "arrivals": offer.arrivals if offer.open_loop else None,
            "offered_per_second": offer.rate or None,
            "in_flight": offer.in_flight or None,
            "seconds": offer.seconds,
            "rows_per_request": offer.mean_rows,
            "deadline_seconds": offer.deadline,
            "requests": self.requests,
            "ok_per_second": self.throughput,
            "in_time_per_second": self.goodput,
            "outcomes": self.recording.by_outcome(),
            "examples": dict(self.examples),
            "latency_seconds": {
                "mean": finite(histogram.mean(counts)),
                **{f"p{100 * q:g}": finite(self.quantile(q)) for q in QUANTILES},
                "max": finite(self.quantile(1.0)),
            },
            "client": {
                "saturated": self.saturation,
                "lag_seconds": {f"p{100 * q:g}": finite(self.lag(q)) for q in (0.5, 0.99, 0.999, 1.0)},
                "busy": self.busy,
                "cpu": self.cpu,
                "most_held_back": self.held,
            },
            "server": self.server,
        }


def finite(value: float) -> float | None:
    """The value if JSON can represent it, else None."""
    return value if math.isfinite(value) else None


def of(offer: OfferedLoad, finished: Finished, server: Mapping[str, Any] | None = None) -> Measurement:
    told = finished.told
    return Measurement(
        offer,
        finished.recording,
        busy=max((t.busy for t in told), default=0.0),
        cpu=sum(t.cpu for t in told),
        held=max((t.held for t in told), default=0),
        examples={OUTCOME_NAMES[status]: text for t in told for status, text in t.examples.items()},
        server=server,
    )


def line(measured: Measurement) -> str:
    """One measurement in one line."""
    offer = measured.offer
    asked = f"{offer.rate:,.0f}/s offered" if offer.open_loop else f"{offer.in_flight} in flight"
    latencies = ", ".join(f"p{100 * q:g} {ms(measured.quantile(q))}" for q in (0.5, 0.99, 0.999))
    failed = "" if not measured.recording.failed else f", {measured.errors:.2%} failed"
    flag = "  CLIENT SATURATED" if measured.saturation else ""
    return f"{asked}: {measured.throughput:,.0f}/s OK{failed}, {latencies}{flag}"


def ms(seconds: float) -> str:
    """A latency to three significant digits."""
    if math.isnan(seconds):
        return "-"
    if math.isinf(seconds):
        return "never"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def table(points: Sequence[Measurement]) -> str:
    """Measurements as aligned text."""
    header = ["offered", "OK/s", "failed", "p50", "p99", "p99.9", "max", "lag p99", "busy", ""]
    lines = [header]
    for point in points:
        offer = point.offer
        asked = f"{offer.rate:,.0f}/s" if offer.open_loop else f"{offer.in_flight} in flight"
        lines.append(
            [
                asked,
                f"{point.throughput:,.0f}",
                f"{point.errors:.2%}",
                *(ms(point.quantile(q)) for q in (0.5, 0.99, 0.999, 1.0)),
                ms(point.lag(0.99)),
                f"{point.busy:.0%}",
                "client saturated" if point.saturation else "",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in lines
    )
