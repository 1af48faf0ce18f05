"""The metrics of several processes add up to those of one that did all of it, whatever is sent and whoever ends."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from forwardpass.errors import Reason
from forwardpass.observability import catalogue
from forwardpass.observability.catalogue import Exporter, SampleSink
from forwardpass.observability.model_metrics import BatchRecord, ModelMetrics
from forwardpass.processes.merged_samples import MergedSamples, SampleRecorder

MODELS = ("a", "b")
# Who did what: (process, model, rows of a batch; 0: a request was refused). None: everybody reports.
EVENTS = st.lists(st.none() | st.tuples(st.integers(0, 2), st.sampled_from(MODELS), st.integers(0, 5)), max_size=30)


class Process:
    """Real metrics of two models, as a server has them."""

    def __init__(self) -> None:
        self.models = {name: ModelMetrics(name, "1") for name in MODELS}
        self.recorder = SampleRecorder()

    def do(self, model: str, rows: int) -> None:
        metrics = self.models[model]
        if not rows:
            metrics.refused("RESOURCE_EXHAUSTED", Reason.QUEUE_ROWS)
            return
        metrics.decoded(1, 0.25)
        metrics.ran(BatchRecord([(1.0, 1)], [rows], 1.5, 0.125, 2.0, 1))

    def collect(self, samples: SampleSink) -> None:
        for metrics in self.models.values():
            metrics.snapshot(samples)
        samples.add(catalogue.IN_FLIGHT_REQUESTS, (), 2)
        samples.add(catalogue.MODEL_INFO, ("a", "1", "cpu", "exact"), 1)

    def report(self, merged: MergedSamples, number: int) -> None:
        self.collect(self.recorder)
        merged.take(number, pickle.loads(pickle.dumps(self.recorder.report())))


def text(*sources: object) -> dict[str, float]:
    """Samples by name and labels, as prometheus_client shows them."""
    registry = CollectorRegistry()
    registry.register(Exporter(*sources))  # type: ignore[arg-type]
    lines = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


@given(EVENTS)
def test_the_sum_is_what_one_process_would_have_counted(events: Sequence[tuple[int, str, int] | None]) -> None:
    processes, alone, merged = [Process() for _ in range(3)], Process(), MergedSamples()
    for event in [*events, None]:
        if event is None:
            for number, process in enumerate(processes):
                process.report(merged, number)
            continue
        number, model, rows = event
        processes[number].do(model, rows)
        alone.do(model, rows)
    expected = text(alone.collect)
    expected["forwardpass_in_flight_requests"] = 6.0
    assert text(merged.collect) == expected


@given(EVENTS)
def test_counts_outlive_their_process_and_gauges_do_not(events: Sequence[tuple[int, str, int] | None]) -> None:
    processes, alone, merged = [Process() for _ in range(3)], Process(), MergedSamples()
    for number, model, rows in [event for event in events if event is not None]:
        processes[number].do(model, rows)
        alone.do(model, rows)
    for number, process in enumerate(processes):
        process.report(merged, number)
    merged.end(1)
    merged.end(1)
    merged.end(7)  # it never reported
    Process().report(merged, 9)  # takes its place
    expected = text(alone.collect)
    expected["forwardpass_in_flight_requests"] = 6.0
    assert text(merged.collect) == expected
    merged.end(0)
    assert text(merged.collect)["forwardpass_in_flight_requests"] == 4.0


def test_what_no_process_serves_any_more_is_not_shown() -> None:
    process, merged = Process(), MergedSamples()
    process.do("a", 1)
    process.report(merged, 0)
    del process.models["a"]
    process.report(merged, 0)
    assert not any('model="a"' in name and "info" not in name for name in text(merged.collect))


def test_unchanged_parts_are_not_sent_again() -> None:
    process = Process()
    process.do("a", 1)
    process.collect(process.recorder)
    first = process.recorder.report()
    process.do("b", 1)
    process.collect(process.recorder)
    second = process.recorder.report()
    assert all(first[key] for key in first)
    assert second["a", "1"] is None and second["b", "1"]


def test_after_a_lost_report_everything_is_sent_again() -> None:
    process, merged = Process(), MergedSamples()
    process.report(merged, 0)
    process.do("a", 1)
    process.collect(process.recorder)
    process.recorder.report()  # lost
    process.recorder.forget()
    process.report(merged, 0)
    assert text(merged.collect) == text(process.collect)
