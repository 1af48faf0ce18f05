"""The text of a scrape is prometheus_client's own, byte for byte; what did not change is not made again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from forwardpass.errors import Reason
from forwardpass.observability import catalogue
from forwardpass.observability.catalogue import METRICS, Exporter, SampleSink
from forwardpass.observability.exposition import Exposition, Pacer
from forwardpass.observability.histogram import Exemplar, Histogram
from forwardpass.observability.model_metrics import BatchRecord, ModelMetrics

Source = Callable[[SampleSink], object]


def theirs(source: Source, is_open: bool) -> bytes:
    registry = CollectorRegistry()
    registry.register(Exporter(source))
    return openmetrics.generate_latest(registry) if is_open else generate_latest(registry)  # type: ignore[no-any-return]


def ours(exposition: Exposition, is_open: bool) -> bytes:
    return b"".join(exposition.text(is_open)) + b"# EOF\n" * is_open


def everything(samples: SampleSink) -> None:
    """Some of every metric, with values and labels of all kinds."""
    rng = random.Random(1)
    values = [0, 1, 999_999, 1_000_000, 123_456_789_012, 0.0, -1.5, 1e-7, 1e21, 0.1 + 0.2, float("inf"), float("nan")]
    names = ["m", 'quo"te', "back\\slash", "new\nline", "Grüße", "", "a,b={}"]
    for metric in METRICS:
        for i in range(6):
            labels = [rng.choice(names) + str(i) for _ in metric.labels]
            if metric.kind == "histogram":
                histogram = Histogram((0.25, 1, 1e6))
                histogram.record(
                    [rng.random() * 2 for _ in range(9)], [rng.choice((1, 7, 2_000_000)) for _ in range(9)]
                )
                example = Exemplar("ab", "cd", 0.75, 1_700_000_000.25)
                samples.add_histogram(metric, labels, histogram, [None, example, None, None] if i % 2 else ())
            else:
                samples.add(metric, labels, rng.choice(values))


@pytest.mark.parametrize("is_open", [False, True], ids=["prometheus", "openmetrics"])
def test_the_text_is_what_prometheus_client_makes_of_the_same_samples(is_open: bool) -> None:
    assert ours(Exposition(everything), is_open) == theirs(everything, is_open)
    assert ours(Exposition(lambda _: None), is_open) == theirs(lambda _: None, is_open)


class Models:
    """Some models' metrics as one source, and how often each was asked for its lines."""

    def __init__(self, count: int) -> None:
        self.metrics = [ModelMetrics(f"m{i}", "1") for i in range(count)]
        self.made: list[str] = []
        for metrics in self.metrics:
            self._watch(metrics)

    def _watch(self, metrics: ModelMetrics) -> None:
        add = metrics._add

        def watched(samples: SampleSink) -> None:
            self.made.append(metrics.labels[0])
            add(samples)

        metrics._add = watched  # type: ignore[method-assign]

    def __call__(self, samples: SampleSink) -> None:
        for metrics in self.metrics:
            metrics.snapshot(samples)


BATCH = BatchRecord([(1.0, 2)], [8], 1.25, 0.5, 2.0, 2)


@pytest.mark.parametrize("is_open", [False, True], ids=["prometheus", "openmetrics"])
def test_only_what_changed_is_made_again(is_open: bool) -> None:
    models = Models(4)
    exposition = Exposition(models)
    changes: list[tuple[list[str], Callable[[], object]]] = [
        (["m0", "m1", "m2", "m3"], lambda: None),
        ([], lambda: None),
        (["m1"], lambda: models.metrics[1].ran(BATCH)),
        (["m2"], lambda: models.metrics[2].refused("UNAVAILABLE", Reason.DRAINING)),
        (["m0", "m3"], lambda: (models.metrics[0].isolate(), models.metrics[3].decoded(1, 0.5))),
        (["m1"], lambda: (models.metrics[1].ran(BATCH), models.metrics[1].counts())),  # folded before the scrape
        ([], lambda: None),
    ]
    for expected, change in changes:
        change()
        models.made.clear()
        text = ours(exposition, is_open)
        assert models.made == expected
        assert text == theirs(models, is_open)


def test_a_model_that_is_loaded_anew_starts_anew() -> None:
    models = Models(1)
    exposition = Exposition(models)
    models.metrics[0].isolate()
    assert b'isolated_total{model="m0",version="1"} 1.0' in ours(exposition, False)
    other = ModelMetrics("m0", "1")
    other.refused("UNAVAILABLE", Reason.DRAINING)  # as many changes
    models.metrics[0] = other
    assert ours(exposition, False) == theirs(models, False)
    models.metrics.clear()
    assert b'model="m0"' not in ours(exposition, False) and not exposition._parts


def test_a_part_without_its_changes_known_is_made_each_time() -> None:
    made: list[int] = []

    def source(samples: SampleSink) -> None:
        samples.part("key", None, lambda into: (made.append(1), into.add(catalogue.READY, (), len(made))))

    exposition = Exposition(source)
    assert [ours(exposition, False).count(b"forwardpass_ready %d.0" % n) for n in (1, 2)] == [1, 1]


def test_other_threads_get_the_interpreter_while_a_text_is_made() -> None:
    now = [0.0]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(now[0])

    def source(samples: SampleSink) -> None:
        for i in range(100):
            now[0] += 1e-4  # for each model
            samples.part(i, i, lambda _: None)

    list(Exposition(source, lambda: Pacer(lambda: now[0], sleep)).text())
    assert len(slept) >= 33
    assert max(b - a for a, b in itertools.pairwise(slept)) <= 4e-4
