"""A server's own metrics over the time of a measurement: the difference between two scrapes.

Reads Prometheus text over HTTP: Forwardpass' histograms, or Triton's counters, which yield only means.
"""

from __future__ import annotations

import math
import urllib.request
from collections.abc import Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]

_TIMEOUT = 5.0  # seconds
_STAGES = ("decode", "queue", "run", "encode", "total")


def scrape(url: str) -> Samples | None:
    """Every sample by name and labels; None if no metrics can be read, or `url` is empty."""
    if not url:
        return None
    # No proxy: the server under load is scraped directly.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT) as response:
            text = response.read().decode()
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    except (OSError, ValueError):
        return None


def window(before: Samples | None, after: Samples | None, model: str) -> dict[str, Any] | None:
    """The activity of `model` between two scrapes, ready for JSON; None if the metrics do not include it.

    "requests"; "rows"; "batches"; "batch_rows" and "queue_seconds": {"mean", and if the server has a histogram
    "buckets": [[bound, count], ...]}; "stages": {name: mean seconds}; "refused": {reason: count}.
    """
    if before is None or after is None:
        return None
    change = {
        (name, labels): value - before.get((name, labels), 0.0)
        for (name, labels), value in after.items()
        if ("model", model) in labels
    }
    if any(name.startswith("forwardpass_") for name, _ in change):
        return _forwardpass(change)
    if any(name.startswith("nv_inference_") for name, _ in change):
        return _triton(change)
    return None


def _forwardpass(change: Samples) -> dict[str, Any]:
    refused: dict[str, float] = {}
    for (name, labels), value in change.items():
        if name == "forwardpass_refused_total" and value:
            reason = dict(labels)["reason"]
            refused[reason] = refused.get(reason, 0.0) + value
    return {
        "requests": _sum(change, "forwardpass_requests_total"),
        "rows": _sum(change, "forwardpass_rows_total"),
        "batches": _sum(change, "forwardpass_batches_total"),
        "batch_rows": _histogram(change, "forwardpass_batch_rows"),
        "queue_seconds": _histogram(change, "forwardpass_stage_seconds", ("stage", "queue")),
        "stages": {
            stage: _histogram(change, "forwardpass_stage_seconds", ("stage", stage))["mean"] for stage in _STAGES
        },
        "refused": refused,
    }


def _triton(change: Samples) -> dict[str, Any]:
    requests = _sum(change, "nv_inference_request_success") + _sum(change, "nv_inference_request_failure")
    rows, batches = _sum(change, "nv_inference_count"), _sum(change, "nv_inference_exec_count")
    stages = {
        stage: _sum(change, f"nv_inference_{name}_duration_us") * 1e-6 / requests if requests else None
        for stage, name in (("queue", "queue"), ("run", "compute_infer"), ("total", "request"))
    }
    return {
        "requests": requests,
        "rows": rows,
        "batches": batches,
        "batch_rows": {"mean": rows / batches if batches else None},
        "queue_seconds": {"mean": stages["queue"]},
        "stages": stages,
        "refused": {},
    }


def _sum(change: Samples, name: str, *wanted: tuple[str, str]) -> float:
    return sum(value for (found, labels), value in change.items() if found == name and labels.issuperset(wanted))


def _histogram(change: Samples, name: str, *wanted: tuple[str, str]) -> dict[str, Any]:
    """The mean, and the number of values in each bucket: [upper bound or None for no bound, count]."""
    running: dict[float, float] = {}
    for (found, labels), value in change.items():
        if found == f"{name}_bucket" and labels.issuperset(wanted):
            bound = float(dict(labels)["le"])
            running[bound] = running.get(bound, 0.0) + value
    buckets = []
    below = 0.0
    for bound in sorted(running):
        buckets.append([bound if math.isfinite(bound) else None, running[bound] - below])
        below = running[bound]
    count = _sum(change, f"{name}_count", *wanted)
    return {"mean": _sum(change, f"{name}_sum", *wanted) / count if count else None, "buckets": buckets}
