"""ModelStatistics from what was noted: nothing counted twice, nothing that ever falls."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from forwardpass.api.model_statistics import statistics
from forwardpass.observability.model_metrics import FOLD_AT, KNOWN_SIZES, BatchRecord, ModelMetrics


def stats(metrics: ModelMetrics) -> Any:
    return statistics(metrics)


def durations(message: Any) -> dict[str, tuple[int, int]]:
    return {field.name: (value.count, value.ns) for field, value in message.inference_stats.ListFields()}


def test_before_the_first_request_all_of_it_is_there_and_zero() -> None:
    message = stats(ModelMetrics("m", "3"))
    assert (message.name, message.version, message.last_inference) == ("m", "3", 0)
    assert (message.inference_count, message.execution_count) == (0, 0)
    names = {f.name for f in message.inference_stats.DESCRIPTOR.fields}
    assert durations(message) == dict.fromkeys(names, (0, 0))
    assert not message.batch_stats


def test_a_batch_counts_its_time_for_each_of_its_requests() -> None:
    metrics = ModelMetrics("m", "1")
    metrics.decoded(3, 0.003)
    # Three requests of two rows each: two came at 10 s and one at 11 s; taken at 12 s, run for 2 s, told at 15 s.
    metrics.ran(BatchRecord(((10.0, 2), (11.0, 1)), [6], 12.0, 2.0, 15.0, 3))
    message = stats(metrics)
    assert (message.inference_count, message.execution_count) == (6, 1)
    second = 10**9
    assert durations(message) == {
        "success": (3, (5 + 5 + 4) * second),
        "fail": (0, 0),
        "queue": (3, (2 + 2 + 1) * second - 3_000_000),
        "compute_input": (3, 3_000_000),
        "compute_infer": (3, 6 * second),
        "compute_output": (3, 3 * second),
        "cache_hit": (0, 0),
        "cache_miss": (0, 0),
    }
    (batch,) = message.batch_stats
    assert (batch.batch_size, batch.compute_infer.count, batch.compute_infer.ns) == (6, 1, 2 * second)
    assert (batch.compute_output.count, batch.compute_output.ns) == (1, second)


def test_a_request_in_slices_is_one_request_and_several_runs() -> None:
    metrics = ModelMetrics("m", "1")
    metrics.ran(BatchRecord(((0.0, 1),), [4, 4, 2], 0.0, 1.0, 1.0, 1))
    message = stats(metrics)
    assert (message.inference_count, message.execution_count) == (10, 3)
    assert [(b.batch_size, b.compute_infer.count, b.compute_infer.ns) for b in message.batch_stats] == [
        (2, 1, 200_000_000),
        (4, 2, 800_000_000),
    ]
    assert message.inference_stats.success.count == 1


def test_those_that_fail_are_told_from_those_that_are_answered() -> None:
    metrics = ModelMetrics("m", "1")
    # A batch of four is run again in halves; one of its requests fails in the end.
    metrics.refused("INVALID_ARGUMENT", "invalid")
    metrics.ran(BatchRecord(((0.0, 4),), [4, 2, 2, 1, 1], 0.0, 1.0, 2.0, 3))
    metrics.refused("RESOURCE_EXHAUSTED", "queue_requests", 5, seconds=0.5)
    message = stats(metrics)
    assert (message.inference_count, message.execution_count) == (3, 5)
    assert durations(message)["success"] == (3, 6 * 10**9)
    assert durations(message)["fail"] == (6, 2 * 10**9 + 500_000_000)


def test_the_last_request_is_told_by_the_calendar() -> None:
    metrics = ModelMetrics("m", "1")
    before = time.time() * 1e3
    now = time.monotonic()
    metrics.ran(BatchRecord(((now, 1),), [1], now, 0.0, now, 1))
    first = stats(metrics).last_inference
    assert before - 2 <= first <= time.time() * 1e3 + 2
    assert stats(metrics).last_inference == first  # nothing came since


@pytest.mark.parametrize("seed", range(20))
def test_no_number_ever_falls_and_the_sums_add_up(seed: int) -> None:
    rng = random.Random(seed)
    metrics = ModelMetrics("m", "1")
    last: dict[str, tuple[int, int]] = {}
    answered = rows = 0
    for i in range(5 * FOLD_AT):
        if rng.random() < 0.5:
            metrics.decoded(rng.randint(1, 5), rng.random())
        count = rng.randint(1, 4)
        won = count if rng.random() < 0.9 else rng.randint(0, count)
        size = rng.randint(1, 3) * count
        metrics.ran(BatchRecord(((i - 0.5 - rng.random(), count),), [size], i - 0.5, rng.random() / 4, float(i), won))
        answered += won
        rows += size * won // count if won == count else round(size * won / count)
        if won < count:
            metrics.refused("INTERNAL", "run_failed", count - won)
        if rng.random() < 0.05:
            message = stats(metrics)
            now = durations(message)
            assert all(now[name] >= last.get(name, (0, 0)) for name in now)
            assert all(ns >= last.get(name, (0, 0))[1] for name, (_, ns) in now.items())
            last = now
            assert message.inference_stats.success.count == answered
            assert message.inference_count == rows
            spent = sum(now[name][1] for name in ("queue", "compute_input", "compute_infer", "compute_output"))
            assert spent == pytest.approx(now["success"][1] + now["fail"][1], rel=1e-6)
    assert last


def test_sizes_beyond_a_bound_are_counted_but_not_each_for_itself() -> None:
    metrics = ModelMetrics("m", "1")
    for rows in range(1, KNOWN_SIZES + 51):
        metrics.ran(BatchRecord(((0.0, 1),), [rows], 0.0, 0.0, 0.0, 1))
    message = stats(metrics)
    assert (len(message.batch_stats), message.execution_count) == (KNOWN_SIZES, KNOWN_SIZES + 50)
