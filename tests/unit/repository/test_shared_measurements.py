"""What was measured of one network holds for others of its shape; what may depend on weights does not."""

from __future__ import annotations

import threading
from pathlib import Path

import onnx
import pytest
from tests.service import models

from forwardpass.batching.admission import Admission
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.execution.placement import CPU, CUDA, Placement
from forwardpass.model.options import ModelConfig
from forwardpass.repository import batch_size
from forwardpass.repository.batch_invariance import Invariance
from forwardpass.repository.loader import LoadedModel, LoadRequest, load
from forwardpass.repository.shared_measurements import OncePerShape, SharedMeasurements
from forwardpass.settings import Settings


def test_one_of_many_threads_measures_and_the_others_wait_for_it() -> None:
    once: OncePerShape[int] = OncePerShape()
    asked, go = threading.Barrier(9), threading.Event()
    made: list[int] = []
    found: list[tuple[int, bool]] = []

    def measure() -> int:
        go.wait(10)
        made.append(1)
        return 7

    def ask(i: int) -> None:
        asked.wait(10)
        value, _, now = once.get("shape", f"m{i}", measure)
        found.append((value, now))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    asked.wait(10)
    go.set()
    for thread in threads:
        thread.join(10)
    assert made == [1]
    assert sorted(found) == [*[(7, False)] * 7, (7, True)]


def test_a_measurement_that_fails_is_made_by_the_next() -> None:
    once: OncePerShape[int] = OncePerShape()

    def fail() -> int:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        once.get("shape", "a", fail)
    assert once.get("shape", "b", lambda: 3) == (3, "b", True)
    assert once.get("shape", "c", lambda: 4) == (3, "b", False)
    assert once.get(None, "c", lambda: 4) == (4, "c", True)


def test_the_shape_that_was_not_asked_for_the_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forwardpass.repository.shared_measurements.MOST_SHAPES", 2)
    once: OncePerShape[int] = OncePerShape()
    for key in ("a", "b", "a", "c"):
        once.get(key, key, lambda: 0)
    assert not once.get("a", "z", lambda: 1).now
    assert once.get("b", "z", lambda: 1).now


def test_runs_that_are_timed_by_the_clock_are_not_measured_beside_each_other() -> None:
    shared = SharedMeasurements()
    with shared.measuring(Placement(CPU, 0, 1, "")), shared.measuring(Placement(CPU, 0, 1, "")):
        pass  # by the thread's CPU time
    with shared.measuring(Placement(CUDA, 0, 1, "", devices=(0,))):
        assert shared._alone.locked()


def loaded(root: Path, shared: SharedMeasurements, name: str, model: onnx.ModelProto, **options: object) -> LoadedModel:
    folder = models.save(root, name, model)
    config = ModelConfig(**options)  # type: ignore[arg-type]
    cores, admission = CpuBudget(1, "for a test"), Admission(100, 1 << 20)
    return load(LoadRequest(name, "1", folder, config, Settings(repository=root), cores, admission, shared=shared))


def test_networks_of_one_shape_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    measure = batch_size.measure

    def counted(*args: object) -> object:
        measured.append(1)
        return measure(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(batch_size, "measure", counted)
    shared = SharedMeasurements()
    first = loaded(tmp_path, shared, "first", models.chain((64, 64, 10), seed=0))
    others = [loaded(tmp_path, shared, f"m{i}", models.chain((64, 64, 10), seed=i)) for i in range(1, 6)]
    assert len(measured) == 1
    assert {m.worker.run_rows for m in (first, *others)} == {first.worker.run_rows}
    assert all("of first/1, of the same shape" in m.why for m in others)
    assert "of the same shape" not in first.why
    # Each has its own from here on.
    times = [m.worker.queue.run_time for m in (first, *others)]
    assert len({id(t) for t in times}) == len(times) and {t.a for t in times} == {times[0].a}
    loaded(tmp_path, shared, "wider", models.chain((64, 65, 10)))
    loaded(tmp_path, shared, "plain", models.chain((64, 64, 10)), graph_optimizations="none")
    assert len(measured) == 3


def test_rows_are_compared_with_each_networks_own_weights(tmp_path: Path) -> None:
    """Rows that only some weights mix: the first of a shape is independent, the second is not."""
    shared = SharedMeasurements()
    first = loaded(tmp_path, shared, "a", models.neighbourly(float("inf")), max_batch_size=16)
    second = loaded(tmp_path, shared, "b", models.neighbourly(0.0), max_batch_size=16)
    assert first.invariance.batches
    assert second.invariance is Invariance.DEPENDENT


def test_a_network_that_is_proved_and_of_a_known_shape_is_probed_again_in_short(tmp_path: Path) -> None:
    shared = SharedMeasurements()
    first = loaded(tmp_path, shared, "first", models.chain(), max_batch_size=32)
    second = loaded(tmp_path, shared, "second", models.chain(seed=1), max_batch_size=32)
    assert first.invariance is second.invariance is Invariance.EXACT
    assert "24 rows alone" in first.why and "8 rows alone and in batches of up to 32" in second.why
    assert "as in those of more sizes of first/1, of the same shape" in second.why
