"""From a transport's calls to the queues: deadlines, priorities, bounds and refusals, on a clock of the test."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.service import models
from tests.unit.made import Collector, message, read

from forwardpass.batching.admission import Admission
from forwardpass.errors import RequestError
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.inference.intake import Intake
from forwardpass.inference.request import AnyRequest
from forwardpass.observability.model_metrics import ModelMetrics
from forwardpass.repository.repository import Repository
from forwardpass.settings import Settings

X = np.ones((2, 4), np.float32)
OPTIONS = "priority_levels = 3\ndefault_priority = 2\n"


class Sink(Collector):
    """A transport with two models behind it, whose clock stands still until it is told."""

    def __init__(self, root: Path, requests: int = 100, nbytes: int = 1 << 20, options: str = OPTIONS) -> None:
        super().__init__()
        models.save(root, "m", models.chain(), options)
        models.save(root, "other", models.chain(seed=1))
        settings = Settings(repository=root, max_batch_size=8, inline_run_limit=10.0)
        self.admission = Admission(requests, nbytes)
        self.repository = Repository(settings, CpuBudget(1, ""), self.admission)
        for entry in self.repository.discover():
            self.repository.load(entry)
        self.now = time.monotonic()  # and there it stays
        self.metrics = ModelMetrics("", "")
        self.intake = Intake(self, self.repository, self.admission, self.metrics, 10_000, clock=lambda: self.now)

    def take(self, call: int, sent: Any, seconds: float | None = None, timings: bool = False) -> AnyRequest | None:
        data = sent if isinstance(sent, bytes) else sent.SerializeToString()
        return self.intake.take(call, data, seconds, timings)

    def reason(self, call: int) -> str:
        (answer,) = self.answers[call]
        return answer.reason if isinstance(answer, RequestError) else "answered"

    def run(self) -> None:
        self.intake.flush()
        while self.intake.run_pending():
            pass


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[Sink]:
    made = Sink(tmp_path)
    yield made
    assert made.repository.close(5.0)
    assert (made.admission.requests, made.admission.nbytes) == (0, 0)


def sent(model: str = "m", x: Any = X, **fields: Any) -> Any:
    return message([("x", x)], model_name=model, **fields)


def test_a_group_is_answered_model_by_model(sink: Sink) -> None:
    sink.intake.begin()
    for call, model in enumerate(("m", "other", "m", "other", "m")):
        assert sink.take(call, sent(model, X * call, id=str(call)))
    sink.run()
    for call, model in enumerate(("m", "other", "m", "other", "m")):
        (answer,) = sink.answers[call]
        assert isinstance(answer, bytes)
        response, (y,) = read(answer)
        assert (response.model_name, response.id) == (model, str(call))
        expected = sink.repository.resolve(model, "").session.run([X * call], (0,))[0]
        assert np.array_equal(y, expected)


def test_what_cannot_be_decoded_is_answered_at_once_and_counted(sink: Sink) -> None:
    sink.intake.begin()
    assert sink.take(1, b"\xff") is None
    assert sink.take(2, sent("nobody")) is None
    assert sink.take(3, b"\0" * 10_001) is None
    assert [sink.reason(i) for i in (1, 2, 3)] == ["invalid", "unknown_model", "too_large"]
    assert sink.metrics.reasons == {"invalid": 1, "unknown_model": 1, "too_large": 1}
    sink.run()
    assert set(sink.answers) == {1, 2, 3}


@pytest.mark.parametrize("timeout", [0, 2_000_000])
def test_a_deadline_is_the_calls_alone(sink: Sink, timeout: int) -> None:
    request = sent()
    request.parameters["timeout"].int64_param = timeout
    sink.intake.begin()
    with_one, without = sink.take(1, request, 60.0), sink.take(2, request)
    assert with_one is not None and without is not None
    assert with_one.deadline == sink.now + 60.0 and without.deadline == math.inf
    assert with_one.arrival == without.arrival == sink.now


@pytest.mark.parametrize(("asked", "expected"), [(0, 2), (1, 1), (3, 3)])
def test_a_priority_is_the_requests_or_the_models(sink: Sink, asked: int, expected: int) -> None:
    request = sent()
    request.parameters["priority"].int64_param = asked
    sink.intake.begin()
    found = sink.take(1, request)
    assert found is not None and found.priority == expected


def test_what_counts_against_the_bounds(sink: Sink) -> None:
    sink.intake.begin()
    request = sent(x=X[:0])
    found = sink.take(1, request)
    assert found is not None
    assert (found.rows, found.nbytes) == (1, len(request.SerializeToString()))  # no rows count as one


def test_beyond_the_servers_bounds_as_many_are_taken_as_fit(tmp_path: Path) -> None:
    sink = Sink(tmp_path, requests=3)
    sink.intake.begin()
    for call in range(5):
        sink.take(call, sent())
    sink.run()
    assert [sink.reason(i) for i in range(5)] == ["answered"] * 3 + ["server_requests"] * 2
    assert sink.admission.requests == 0
    sink.intake.begin()
    sink.take(9, sent())
    sink.run()
    assert sink.reason(9) == "answered"
    sink.repository.close(5.0)


def test_a_server_that_stops_takes_nobody(sink: Sink) -> None:
    sink.admission.close()
    sink.intake.begin()
    sink.take(1, sent())
    sink.take(2, sent())
    sink.run()
    assert [sink.reason(i) for i in (1, 2)] == ["draining", "draining"]


def test_a_model_that_is_swapped_is_seen_by_the_next_group(sink: Sink, tmp_path: Path) -> None:
    sink.intake.begin()
    first = sink.take(1, sent())
    sink.run()
    assert first is not None and first.template.target is sink.repository.resolve("m", "")
    (entry,) = [e for e in sink.repository.entries() if e.name == "m"]
    sink.repository.load(entry)  # again: another worker
    sink.intake.begin()
    second = sink.take(2, sent())
    sink.run()
    assert second is not None and second.template.target is sink.repository.resolve("m", "")
    assert second.template.target is not first.template.target
    first.template.target.close(5.0)


def test_what_was_answered_is_not_kept(sink: Sink) -> None:
    sink.intake.begin()
    request = sink.take(1, sent())
    alone = sys.getrefcount(object())  # what asking itself holds
    sink.run()
    assert sink.reason(1) == "answered"
    assert sys.getrefcount(request) == alone + 1  # this test's own: neither the intake nor the queue has it any more


@pytest.mark.parametrize("calls", [1, 3])
def test_a_run_behind_another_models_is_announced_with_its_length(sink: Sink, calls: int) -> None:
    """So that what was answered before a long one need not wait for it. One model's own runs are not."""
    announced: list[float] = []
    sink.intake.before_run = announced.append
    for models_called in (("m",), ("m", "other")):
        sink.intake.begin()
        for model in models_called:
            for call in range(calls):
                assert sink.take(call, sent(model))
        sink.run()
        assert len(announced) == (0 if len(models_called) == 1 else 2)
    assert all(0 < seconds < 10 for seconds in announced)
