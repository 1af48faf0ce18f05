"""The metrics as a scraper sees them: valid exposition, histograms that add up, nothing lost on the way."""

from __future__ import annotations

import random
import re
import threading
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from forwardpass.errors import Reason
from forwardpass.observability.catalogue import METRICS, REFUSED_TOTAL, Exporter
from forwardpass.observability.histogram import Histogram
from forwardpass.observability.model_metrics import (
    FOLD_AT,
    LATENCY_BOUNDS,
    STAGES,
    BatchRecord,
    ModelMetrics,
)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(*metrics: ModelMetrics) -> Samples:
    """What /metrics would say, through Prometheus' own parser."""
    registry = CollectorRegistry()

    def source(into: dict[str, Any]) -> None:
        for one in metrics:
            one.snapshot(into)

    registry.register(Exporter(source))
    text = generate_latest(registry).decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def one(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted({"model": "m", "version": "1", **labels}.items()))]


def buckets(samples: Samples, name: str, **labels: str) -> list[tuple[float, float]]:
    want = {"model": "m", "version": "1", **labels}
    found = []
    for (sample, pairs), value in samples.items():
        given = dict(pairs)
        bound = given.pop("le", "")
        if sample == f"{name}_bucket" and given == want:
            found.append((float(bound), value))
    return sorted(found)


@pytest.mark.parametrize("batches", [1, FOLD_AT - 1, FOLD_AT, 3 * FOLD_AT + 7])
def test_every_batch_is_in_every_histogram_once(batches: int) -> None:
    rng = random.Random(batches)
    metrics = ModelMetrics("m", "1")
    requests = rows = matrices = 0
    waited = ran = total = 0.0
    for i in range(batches):
        arrivals = [(i - rng.random(), rng.randint(1, 5)) for _ in range(rng.randint(1, 3))]
        taken, run, sizes = float(i), rng.random() / 100, [rng.randint(0, 64) for _ in range(rng.randint(1, 2))]
        done = taken + run + 0.001
        count = sum(n for _, n in arrivals)
        metrics.decoded(count, 0.002 * count)
        metrics.ran(BatchRecord(arrivals, sizes, taken, run, done, count))
        requests, rows, matrices = requests + count, rows + sum(sizes), matrices + len(sizes)
        waited += sum((taken - a) * n for a, n in arrivals)
        total += sum((done - a) * n for a, n in arrivals)
        ran += run * count
    samples = scrape(metrics)
    sums = {"decode": 0.002 * requests, "queue": waited, "run": ran, "encode": 0.001 * requests, "total": total}
    assert set(sums) == set(STAGES)
    for stage, expected in sums.items():
        assert one(samples, "forwardpass_stage_seconds_count", stage=stage) == requests
        assert one(samples, "forwardpass_stage_seconds_sum", stage=stage) == pytest.approx(expected)
    assert one(samples, "forwardpass_batch_rows_count") == matrices == one(samples, "forwardpass_batches_total")
    assert one(samples, "forwardpass_batch_rows_sum") == rows == one(samples, "forwardpass_rows_total")
    assert one(samples, "forwardpass_requests_total", code="OK") == requests


def test_a_model_without_a_request_has_counters_and_no_histograms() -> None:
    """A thousand models of which ten are asked would have 150 lines each for nothing."""
    metrics = ModelMetrics("m", "1")
    metrics.refused("RESOURCE_EXHAUSTED", Reason.QUEUE_REQUESTS)
    samples = scrape(metrics)
    assert not [name for name, _ in samples if name.startswith(("forwardpass_stage", "forwardpass_batch_rows"))]
    assert one(samples, "forwardpass_requests_total", code="OK") == 0
    assert one(samples, "forwardpass_refused_total", reason="queue_requests") == 1
    metrics.decoded(1, 0.001)
    samples = scrape(metrics)
    assert one(samples, "forwardpass_stage_seconds_count", stage="decode") == 1
    assert one(samples, "forwardpass_stage_seconds_count", stage="total") == 0


def test_buckets_are_cumulative_and_closed_above() -> None:
    metrics = ModelMetrics("m", "1")
    waits = [0.0, 50e-6, 50.1e-6, 0.03, 9.99, 1e6]  # on a bound, just above one, beyond all
    for wait in waits:
        metrics.ran(BatchRecord([(-wait, 1)], [1], 0.0, 0.0, 0.0, 1))
    found = buckets(scrape(metrics), "forwardpass_stage_seconds", stage="queue")
    assert [bound for bound, _ in found] == [*LATENCY_BOUNDS, float("inf")]
    for bound, value in found:
        assert value == sum(wait <= bound for wait in waits), bound


def test_a_histogram_counts_weights() -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.record([0.5, 1.5, 2.5, 1.0], [10, 20, 30, 5])
    histogram.record([], [])
    assert histogram.buckets() == [("1", 15), ("2", 35), ("+Inf", 65)]
    assert histogram.total == pytest.approx(0.5 * 10 + 1.5 * 20 + 2.5 * 30 + 5)


def test_every_reason_is_in_the_help() -> None:
    text = REFUSED_TOTAL.meaning
    assert "reason" in REFUSED_TOTAL.labels
    assert {*re.findall(r"\w+", text.partition("by reason: ")[2])} == {*Reason}


def test_refusals_count_under_their_code_and_their_reason() -> None:
    metrics = ModelMetrics("m", "1")
    metrics.refused("RESOURCE_EXHAUSTED", Reason.QUEUE_ROWS, 3)
    metrics.refused("RESOURCE_EXHAUSTED", Reason.QUEUE_BYTES)
    metrics.isolate()
    samples = scrape(metrics)
    assert one(samples, "forwardpass_requests_total", code="RESOURCE_EXHAUSTED") == 4
    assert one(samples, "forwardpass_refused_total", reason="queue_rows") == 3
    assert one(samples, "forwardpass_isolated_total") == 1


def test_notes_are_kept_within_bounds_whatever_is_missing() -> None:
    only_decoded, only_ran = ModelMetrics("m", "1"), ModelMetrics("m", "1")
    for _ in range(50 * FOLD_AT):
        only_decoded.decoded(1, 1e-6)  # all refused: nothing runs
        only_ran.ran(BatchRecord([(0.0, 1)], [1], 0.0, 0.0, 0.0, 1))
    assert len(only_decoded._decodes) <= 10 * FOLD_AT
    assert len(only_ran._notes) <= FOLD_AT
    assert one(scrape(only_decoded), "forwardpass_stage_seconds_count", stage="decode") == 50 * FOLD_AT


def test_threads_lose_nothing_while_somebody_scrapes() -> None:
    metrics = ModelMetrics("m", "1")

    def work() -> None:
        for _ in range(2000):
            metrics.decoded(1, 1e-6)
            metrics.ran(BatchRecord([(0.0, 1)], [2], 0.0, 0.0, 0.0, 1))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads):
        scrape(metrics)
    samples = scrape(metrics)
    assert one(samples, "forwardpass_requests_total", code="OK") == 8000 == one(samples, "forwardpass_batches_total")
    assert one(samples, "forwardpass_stage_seconds_count", stage="decode") == 8000


def test_a_name_cannot_break_the_format() -> None:
    metrics = ModelMetrics('a"b\\c\nd', "1")
    metrics.refused("INTERNAL", 'x"\n')
    samples = scrape(metrics, ModelMetrics("m", "1"))
    assert any(dict(pairs).get("model") == 'a"b\\c\nd' for _, pairs in samples)


def test_every_metric_is_described_before_anything_happened() -> None:
    registry = CollectorRegistry()
    registry.register(Exporter(lambda _: None))
    text = generate_latest(registry).decode()
    for metric in METRICS:
        name, kind, labels, meaning = metric.name, metric.kind, metric.labels, metric.meaning
        assert f"# TYPE {name} {kind}" in text
        assert meaning.endswith(".") and len(set(labels)) == len(labels)
        assert name.endswith("_total") == (kind == "counter")
