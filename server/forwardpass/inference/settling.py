"""Counts the errors of a model's requests, and rejects those that never run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from forwardpass.batching.admission import Admission
from forwardpass.batching.request import Settled
from forwardpass.errors import RequestError
from forwardpass.inference.accounting import log_refused
from forwardpass.inference.request import AnyRequest, deliver
from forwardpass.inference.request_traces import trace_refused
from forwardpass.observability.model_metrics import ModelMetrics
from forwardpass.transport.interface import Answer


def count_errors(metrics: ModelMetrics, answers: Sequence[Answer], seconds: float = 0.0) -> int:
    """Count the errors among `answers`; returns how many. `seconds`: the total wait of requests that never ran."""
    errors = [a for a in answers if isinstance(a, RequestError)]
    texts = {(e.status.name, e.reason): str(e) for e in errors}
    for (code, reason), times in Counter((e.status.name, e.reason) for e in errors).items():
        metrics.refused(code, reason, times, seconds * times / len(errors), texts[code, reason])
    return len(errors)


class Rejections:
    """Rejects requests of one model that were admitted and never run."""

    def __init__(self, metrics: ModelMetrics, admission: Admission, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._admission = admission
        self._clock = clock

    def reject(self, refused: Sequence[Settled[AnyRequest]]) -> None:
        """Count and log the errors, and send them."""
        requests, errors = [r for r, _ in refused], [e for _, e in refused]
        metrics, now = self._metrics, self._clock()
        count_errors(metrics, errors, sum([now - r.arrival for r in requests]))
        if metrics.access is not None:
            log_refused(metrics.access, metrics.labels, requests, errors, now)
        if metrics.tracing is not None:
            trace_refused(metrics.tracing, metrics.labels, requests, errors, now)
        deliver(metrics.labels[0], requests, errors, None)
        self._admission.release(len(requests), sum([r.nbytes for r in requests]))
