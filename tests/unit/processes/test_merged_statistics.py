"""ModelStatistics of several processes together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from forwardpass.api.model_statistics import statistics
from forwardpass.errors import Reason
from forwardpass.observability.model_metrics import BatchRecord, ModelMetrics
from forwardpass.processes.merged_statistics import MergedStatistics, added

LABELS = ("m", "1")
BATCHES = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), max_size=30)  # process, rows


def ran(metrics: ModelMetrics, rows: int) -> None:
    metrics.ran(BatchRecord([(1.0, 1)], [rows], 1.5, 0.125, 2.0, 1))


@given(BATCHES)
def test_they_are_those_of_one_process_that_did_all_of_it(batches: list[tuple[int, int]]) -> None:
    processes, alone, merged = [ModelMetrics(*LABELS) for _ in range(3)], ModelMetrics(*LABELS), MergedStatistics()
    for number, rows in batches:
        ran(processes[number], rows)
        ran(alone, rows)
    processes[0].refused("RESOURCE_EXHAUSTED", Reason.QUEUE_ROWS, 2, 0.5)
    alone.refused("RESOURCE_EXHAUSTED", Reason.QUEUE_ROWS, 2, 0.5)
    for number, metrics in enumerate(processes):
        merged.take(number, {LABELS: statistics(metrics).SerializeToString()})
    merged.take(1, {LABELS: None})  # as before
    merged.end(2)
    found, expected = merged.of(LABELS), statistics(alone)
    expected.last_inference = found.last_inference  # a time of the wall clock, at which each was made
    assert found == expected


def test_a_version_that_nobody_served_has_none() -> None:
    assert MergedStatistics().of(LABELS) is None


def test_adding_leaves_both_as_they_were() -> None:
    metrics = ModelMetrics(*LABELS)
    ran(metrics, 2)
    one, other = statistics(metrics), statistics(metrics)
    total = added(one, other)
    assert one == other == statistics(metrics)
    assert total.execution_count == 2 and total.batch_stats[0].compute_infer.count == 2
