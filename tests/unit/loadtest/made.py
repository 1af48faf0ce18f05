"""Measurements with known figures, for the tests of what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from forwardpass.errors import Status
from forwardpass.loadtest.generator.recording import Recording
from forwardpass.loadtest.measurement import Measurement, OfferedLoad

SLICES = 20


def measured(
    rate: float = 1000.0,
    latency: float = 0.002,
    *,
    target: str = "a:1",
    seconds: float = 2.0,
    failed: int = 0,
    lag: float = 1e-6,
    busy: float = 0.3,
    in_flight: int = 0,
    server: Mapping[str, Any] | None = None,
) -> Measurement:
    """`rate` answers a second whose latencies are exponential with that mean, `failed` refusals among them."""
    generator = np.random.default_rng(1)
    recording = Recording(SLICES)
    count = round(rate * seconds)
    slices = generator.integers(0, SLICES, count)
    recording.add_latencies(slices, generator.exponential(latency, count))
    recording.add_lags(slices, np.full(count, lag))
    recording.add_outcome(3, Status.RESOURCE_EXHAUSTED, failed)
    offer = OfferedLoad(target, "digits", 0.0 if in_flight else rate, in_flight, seconds, "poisson", 1.0)
    examples = {"RESOURCE_EXHAUSTED": "the queue is <full>"} if failed else {}
    return Measurement(offer, recording, busy, busy, 0, examples, server)


def server_window() -> dict[str, Any]:
    """What a Forwardpass server says about itself."""
    return {
        "requests": 2000.0,
        "rows": 2000.0,
        "batches": 500.0,
        "batch_rows": {"mean": 4.0, "buckets": [[1.0, 100.0], [2.0, 0.0], [4.0, 300.0], [8.0, 100.0], [None, 0.0]]},
        "queue_seconds": {"mean": 1e-4, "buckets": [[5e-5, 900.0], [1e-4, 800.0], [2e-4, 300.0], [None, 0.0]]},
        "stages": {"run": 5e-5},
        "refused": {"queue_rows": 3.0},
    }
