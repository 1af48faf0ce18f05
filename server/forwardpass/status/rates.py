"""Rates and quantiles from two samples of counters. Pure: no clock, no server.

A sample holds the totals of every model version at one time; all that is shown of traffic is a difference of two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forwardpass.observability.model_metrics import LATENCY_BOUNDS, ModelTotals

Labels = tuple[str, str]  # model, version; both empty: requests without a model
SHOWN_STAGES = ("total", "queue", "run")


@dataclass(frozen=True, slots=True)
class CounterSample:
    """The counters of every model version, and seconds of CPU, at one time."""

    at: float  # seconds, monotonic
    cpu: float  # seconds that the process has used
    totals: Mapping[Labels, ModelTotals]
    queued: int  # requests waiting then, over all models


def quantile(counts: Sequence[int], share: float) -> float | None:
    """The value below which `share` of the counted lie, interpolated in its bucket of LATENCY_BOUNDS; None: no counts.

    Of values beyond the last bound only that is known: the bound is returned.
    """
    total = sum(counts)
    if not total:
        return None
    wanted, running, lower = share * total, 0, 0.0
    for count, upper in zip(counts, LATENCY_BOUNDS, strict=False):
        if count and running + count >= wanted:
            return lower + (upper - lower) * (wanted - running) / count
        running += count
        lower = upper
    return LATENCY_BOUNDS[-1]


def traffic(then: CounterSample, now: CounterSample, labels: Iterable[Labels]) -> dict[str, Any]:
    """Rates and quantiles of these versions together, between two samples. Seconds, and requests or rows a second."""
    seconds = max(now.at - then.at, 1e-9)
    stages = {stage: [0] * (len(LATENCY_BOUNDS) + 1) for stage in SHOWN_STAGES}
    answered = failed = rows = batches = 0
    for label in labels:
        before, after = then.totals.get(label), now.totals.get(label)
        if before is None or after is None or before == after:  # most of many models are idle
            continue
        for stage, counts in stages.items():
            for place, (a, b) in enumerate(zip(before.stages[stage], after.stages[stage], strict=True)):
                counts[place] += max(0, b - a)
        answered += max(0, after.codes.get("OK", 0) - before.codes.get("OK", 0))
        failed += max(0, _failed(after) - _failed(before))
        rows += max(0, after.rows - before.rows)
        batches += max(0, after.batches - before.batches)
    return {
        "requests_per_second": answered / seconds,
        "failed_per_second": failed / seconds,
        "rows_per_second": rows / seconds,
        "rows_per_batch": rows / batches if batches else None,
        "stages": {
            stage: {"p50": quantile(counts, 0.5), "p99": quantile(counts, 0.99)} for stage, counts in stages.items()
        },
    }


def answered_per_second(then: CounterSample, now: CounterSample) -> dict[Labels, float]:
    """Of each version that is in both samples."""
    seconds = max(now.at - then.at, 1e-9)
    return {
        label: max(0, after.codes.get("OK", 0) - then.totals[label].codes.get("OK", 0)) / seconds
        for label, after in now.totals.items()
        if label in then.totals
    }


def refusals(then: CounterSample | None, now: CounterSample) -> list[dict[str, Any]]:
    """Requests refused or failed, by model, version and reason: in total, and a second since `then`. Most first."""
    found = []
    for (model, version), totals in now.totals.items():
        before = then.totals.get((model, version)) if then is not None else None
        for reason, total in totals.reasons.items():
            rate = None
            if then is not None and before is not None:
                rate = max(0, total - before.reasons.get(reason, 0)) / max(now.at - then.at, 1e-9)
            found.append(
                {"model": model, "version": version, "reason": str(reason), "total": total, "per_second": rate}
            )
    return sorted(found, key=lambda entry: (-entry["total"], entry["model"], entry["version"], entry["reason"]))


def _failed(totals: ModelTotals) -> int:
    return sum(totals.codes.values()) - totals.codes.get("OK", 0)
