"""A worker with a real network behind it, its transport, and what it was sent: for the tests of the worker."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from tests.unit.made import Collector, Target, request_for, session

from forwardpass.batching.admission import Admission
from forwardpass.batching.request import QueueLimits, WorkerOptions
from forwardpass.batching.run_time_model import RunTimeModel
from forwardpass.errors import RequestError
from forwardpass.inference.request import AnyRequest
from forwardpass.inference.worker import Worker
from forwardpass.observability.model_metrics import ModelMetrics
from forwardpass.transport.interface import Answer

LONG = 1e12  # turns of `hold`: a run that does not end by itself


class Bench:
    """A worker, its transports, and what it was sent."""

    def __init__(self, model: onnx.ModelProto, folder: Path, inline: float = 0.0, **limits: Any) -> None:
        options = {k: limits.pop(k) for k in ("instances", "row_independent") if k in limits}
        self.session = session(model, folder)
        self.admission = Admission(100_000, 1 << 30)
        self.metrics = ModelMetrics("m", "1")
        self.sink = Collector()
        self.worker = Worker(
            "m",
            "1",
            [self.session],
            self.session.signature,
            options=WorkerOptions(QueueLimits(**limits), inline_run_limit=inline, **options),
            run_time=RunTimeModel(),
            metrics=self.metrics,
            admission=self.admission,
        )
        self.target = Target(self.session.signature)
        self.worker.start()

    def request(
        self, *arrays: NDArray[Any], seconds: float | None = None, wait: float | None = None, **more: Any
    ) -> AnyRequest:
        """`seconds` to its deadline; it may `wait` so many for an instance."""
        now = time.monotonic()
        if wait is not None:
            more["start_by"] = now + wait
        deadline = now + seconds if seconds is not None else float("inf")
        return request_for(
            self.target, arrays, sink=more.pop("sink", self.sink), arrival=now, deadline=deadline, **more
        )

    def submit(self, *requests: AnyRequest) -> tuple[AnyRequest, ...]:
        """As a transport's intake does: admit, submit, and step until nothing is left for this thread."""
        assert self.admission.admit(len(requests), sum(r.nbytes for r in requests)) is None
        self.worker.submit(requests, time.monotonic())
        while self.worker.run_pending():
            pass
        return requests

    def hold(self, turns: float = LONG) -> AnyRequest:
        """Keep the only instance busy; returns once the run has begun."""
        (held,) = self.submit(self.request(np.array([[turns]], np.float32)))
        wait_until(lambda: bool(self.worker.queue.running_requests))
        return held

    def let_go(self) -> None:
        """End whatever runs now."""
        wait_until(lambda: bool(self.worker.end_runs_since(float("inf"))))

    def settled(self) -> None:
        """Nothing is left anywhere."""
        queue = self.worker.queue
        wait_until(lambda: self.admission.requests == 0 and not queue.running_requests)
        assert (len(queue), queue.waiting_rows, queue.nbytes) == (0, 0, 0)
        assert (queue.running_requests, self.admission.nbytes) == (0, 0)

    def counted(self) -> dict[str, int]:
        """Requests by status."""
        with self.metrics._lock:
            self.metrics._fold()
            return dict(self.metrics.codes)


def wait_until(there: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def rows(count: int, seed: int = 0, width: int = 4) -> NDArray[Any]:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def reason(answer: Answer) -> str:
    return answer.reason if isinstance(answer, RequestError) else "answered"
