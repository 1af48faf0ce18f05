"""A model version's statistics as the protocol's ModelStatistics, made from the metrics on demand. Pure."""

from __future__ import annotations

from typing import Any

from forwardpass import protocol
from forwardpass.observability.model_metrics import ModelCounts, ModelMetrics

NANOSECONDS = 1e9


def statistics(metrics: ModelMetrics) -> Any:
    """An inference.ModelStatistics. Counts and times continue across a reload of the version.

    compute_input is the time to decode requests, taken out of their wait; stacking them belongs to compute_infer.
    """
    counts: ModelCounts = metrics.counts()
    name, version = metrics.labels
    message = protocol.ModelStatistics(
        name=name,
        version=version,
        last_inference=counts.last_ms,
        inference_count=counts.answered_rows,
        execution_count=counts.batches,
    )
    found = message.inference_stats
    for duration, count, seconds in (
        (found.success, counts.answered, counts.answered_seconds),
        (found.fail, counts.failed, counts.failed_seconds),
        (found.queue, counts.ran, counts.queue_seconds),
        (found.compute_input, counts.ran, counts.decode_seconds),
        (found.compute_infer, counts.ran, counts.run_seconds),
        (found.compute_output, counts.ran, counts.encode_seconds),
        (found.cache_hit, 0, 0.0),
        (found.cache_miss, 0, 0.0),
    ):
        _fill(duration, count, seconds)
    for rows, runs, run_seconds, encode_seconds in counts.runs:
        entry = message.batch_stats.add(batch_size=rows)
        _fill(entry.compute_input, runs, 0.0)
        _fill(entry.compute_infer, runs, run_seconds)
        _fill(entry.compute_output, runs, encode_seconds)
    return message


def _fill(duration: Any, count: int, seconds: float) -> None:
    duration.SetInParent()  # tools read all of them, including those that are zero
    duration.count, duration.ns = count, round(seconds * NANOSECONDS)
