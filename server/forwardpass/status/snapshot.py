"""What the status page shows, as one JSON document: figures of the last seconds, models, refusals, errors, the process.

Counters are sampled only when somebody asks, at most once in STEP seconds however many ask, so that every viewer sees
the same and a viewer more costs nothing. Requests are not touched: a sample copies the totals that /metrics has.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from forwardpass import __version__
from forwardpass.batching.admission import Admission
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.execution.onnx_runtime import ort
from forwardpass.model.signature import TensorSpec
from forwardpass.observability.model_metrics import ModelMetrics, ModelTotals
from forwardpass.observability.recent_errors import RecentError
from forwardpass.repository.loader import LoadedModel
from forwardpass.repository.model_version import ModelVersion
from forwardpass.repository.repository import Repository
from forwardpass.status import process
from forwardpass.status.rates import CounterSample, Labels, answered_per_second, refusals, traffic

STEP = 0.9  # seconds: a document younger than this is given out again
WINDOW = 10.0  # seconds that rates and quantiles are taken over
KEPT = 120.0  # seconds of samples, which the charts show
MODEL_CHART = 60  # points of a model's own chart
LAST_ERRORS = 20
MOST_LABELS = 64  # of one tensor


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What the page shows and the server alone knows."""

    ready: Callable[[], bool]
    cores: CpuBudget
    infer: bool  # whether /v2/models/... is served at the page's own address


class ProcessSample(NamedTuple):
    """What is shown of one process."""

    pids: frozenset[int]
    cpu: float  # seconds that it has used
    totals: dict[Labels, ModelTotals]
    queued: int  # requests
    requests: int  # in flight
    nbytes: int  # of these
    errors: list[tuple[RecentError, Labels]]


class StatusSource:
    """Makes the document. Thread-safe; blocks for as long as the counters' locks are held, which is microseconds."""

    def __init__(
        self,
        repository: Repository,
        admission: Admission,
        metrics: ModelMetrics,
        facts: ServerFacts,
        clock: Callable[[], float] = time.monotonic,
        others: Callable[[], Sequence[ProcessSample]] = lambda: (),
    ) -> None:
        """`metrics`: of requests without a model. `others`: of processes that serve together with this one; blocks."""
        self._others = others
        self._repository = repository
        self._admission = admission
        self._metrics = metrics
        self._facts = facts
        self._clock = clock
        self._began = clock()
        self._samples: deque[CounterSample] = deque()
        self._pids: frozenset[int] = frozenset()
        self._charts: deque[dict[str, Any]] = deque()  # one for each sample but the first
        self._document = b""
        self._lock = threading.Lock()

    def document(self) -> bytes:
        """The document as JSON; not older than STEP seconds."""
        with self._lock:
            now = self._clock()
            if not self._document or now - self._samples[-1].at >= STEP:
                self._document = json.dumps(self._look(now), allow_nan=False, separators=(",", ":")).encode()
            return self._document

    def own(self) -> ProcessSample:
        """What is shown of this process alone."""
        entries = self._repository.entries()
        totals = {self._metrics.labels: self._metrics.totals()}
        sources: list[tuple[Labels, ModelMetrics]] = [(self._metrics.labels, self._metrics)]
        queued = 0
        for entry in entries:
            if entry.loaded is not None:
                worker = entry.loaded.worker
                totals[worker.metrics.labels] = worker.metrics.totals()
                queued += len(worker.queue)
                sources.append((worker.metrics.labels, worker.metrics))
        errors = [(error, labels) for labels, metrics in sources for error in metrics.recent_errors.list()]
        return ProcessSample(
            frozenset((os.getpid(),)),
            time.process_time(),
            totals,
            queued,
            self._admission.requests,
            self._admission.nbytes,
            errors,
        )

    def _all(self) -> ProcessSample:
        """Of all processes together."""
        found = self.own()
        for other in self._others():
            totals = found.totals
            for labels, theirs in other.totals.items():
                totals[labels] = totals[labels].plus(theirs) if labels in totals else theirs
            found = ProcessSample(
                found.pids | other.pids, found.cpu + other.cpu, totals, found.queued + other.queued,
                found.requests + other.requests, found.nbytes + other.nbytes, found.errors + other.errors,
            )  # fmt: skip
        return found

    def _look(self, now: float) -> dict[str, Any]:
        """Take a sample and describe the server. Lock held."""
        entries = self._repository.entries()
        found = self._all()
        sample = CounterSample(now, found.cpu, found.totals, found.queued)
        if found.pids != self._pids:  # what the others have counted is no part of what happened since
            self._samples.clear()
            self._pids = found.pids
        self._keep(sample)
        then = self._window_start(now)
        labels = list(sample.totals)
        return {
            "at": time.time(),
            "window_seconds": None if then is None else now - then.at,
            "server": self._server(now, entries, then, found),
            "traffic": None if then is None else traffic(then, sample, labels),
            "queue_requests": sample.queued,
            "chart": {
                "seconds_ago": [round(now - c["at"], 2) for c in self._charts],
                **{
                    name: [c[name] for c in self._charts]
                    for name in ("requests_per_second", "failed_per_second", "p50", "p99", "rows_per_batch", "queued")
                },
            },
            "models": [self._model(entry, then, sample) for entry in entries],
            "skipped": [
                {"folder": f"{name}/{version}" if version else name, "reason": why}
                for name, version, why in self._repository.skipped()
            ],
            "refused": refusals(then, sample),
            "errors": list(_errors(found)),
        }

    # -- samples ------------------------------------------------------------------------------------------------------

    def _keep(self, sample: CounterSample) -> None:
        """Add a sample, its point in the charts, and forget what is too old."""
        last = self._samples[-1] if self._samples else None
        if last is not None and sample.at - last.at <= WINDOW:  # otherwise nobody looked in between
            found = traffic(last, sample, sample.totals)
            self._charts.append(
                {
                    "at": sample.at,
                    "requests_per_second": _short(found["requests_per_second"]),
                    "failed_per_second": _short(found["failed_per_second"]),
                    "p50": found["stages"]["total"]["p50"],
                    "p99": found["stages"]["total"]["p99"],
                    "rows_per_batch": _short(found["rows_per_batch"]),
                    "queued": sample.queued,
                    "models": answered_per_second(last, sample),
                }
            )
        self._samples.append(sample)
        while len(self._samples) > 1 and sample.at - self._samples[0].at > 2 * WINDOW:
            self._samples.popleft()
        while self._charts and sample.at - self._charts[0]["at"] > KEPT:
            self._charts.popleft()

    def _window_start(self, now: float) -> CounterSample | None:
        """The oldest sample of the last WINDOW seconds, other than the newest. None: nobody looked before."""
        inside = [s for s in self._samples if now - s.at <= WINDOW + STEP]
        return inside[0] if len(inside) > 1 else None

    # -- parts --------------------------------------------------------------------------------------------------------

    def _server(
        self, now: float, entries: list[ModelVersion], then: CounterSample | None, found: ProcessSample
    ) -> dict[str, Any]:
        providers = sorted({e.loaded.placement.label for e in entries if e.loaded is not None})
        return {
            "version": __version__,
            "onnxruntime": ort.__version__,
            "ready": self._facts.ready(),
            "infer": self._facts.infer,
            "uptime_seconds": now - self._began,
            "providers": providers,
            "in_flight_requests": found.requests,
            "in_flight_bytes": found.nbytes,
            "cores_used": None if then is None else (found.cpu - then.cpu) / max(now - then.at, 1e-9),
            **process.facts(self._facts.cores),
        }

    def _model(self, entry: ModelVersion, then: CounterSample | None, sample: CounterSample) -> dict[str, Any]:
        found: dict[str, Any] = {
            "name": entry.name,
            "version": entry.version,
            "state": entry.phase,
            "reason": entry.reason,
        }
        if entry.loaded is not None:
            labels = entry.loaded.worker.metrics.labels
            found |= _served(entry.loaded)
            found["traffic"] = None if then is None else traffic(then, sample, [labels])
            found["chart"] = [_short(c["models"].get(labels)) for c in list(self._charts)[-MODEL_CHART:]]
            found["answered"] = sample.totals[labels].codes.get("OK", 0)
        return found


def _errors(found: ProcessSample) -> Iterator[dict[str, Any]]:
    """The last errors of all models, newest first."""
    for error, (model, version) in sorted(found.errors, key=lambda pair: -pair[0].at)[:LAST_ERRORS]:
        yield {"model": model, "version": version, **error._asdict()}


def _served(loaded: LoadedModel) -> dict[str, Any]:
    """What is shown of a version that serves, beside its traffic."""
    worker, contract = loaded.worker, loaded.contract
    queue = worker.queue
    return {
        "provider": loaded.placement.label,
        "instances": worker.options.instances,
        "threads": loaded.placement.threads,
        "queue": {"requests": len(queue), "rows": queue.waiting_rows, "running": queue.running_requests},
        "batching": {
            "verdict": loaded.invariance.value,
            "batches": loaded.batches,
            "most_rows": worker.run_rows if loaded.batches else 1,
            "why": loaded.why,
        },
        "contract": None
        if contract is None
        else {
            "rows": contract.samples.rows,
            "rtol": contract.tolerance.rtol,
            "atol": contract.tolerance.atol,
            "largest_difference": contract.largest_difference,
            "precision": contract.precision,
        },
        "inputs": [_tensor(t) for t in worker.signature.inputs],
        "outputs": [_tensor(t) for t in worker.signature.outputs if t.name not in worker.signature.hidden],
        "loaded_seconds": loaded.seconds,
    }


def _tensor(tensor: TensorSpec) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "datatype": tensor.datatype.name,
        "shape": list(tensor.shape),
        "labels": list(tensor.labels[:MOST_LABELS]),
    }


def _short(number: float | None) -> float | None:
    """Four digits: charts show no more, and the document is sent every second."""
    return None if number is None else float(f"{number:.4g}")
