"""What max_batch_size is: as told where somebody says, measured where nobody does, and said so at start-up."""

from __future__ import annotations

import itertools
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from tests.unit.made import session

from forwardpass.execution.placement import Placement
from forwardpass.execution.providers import place
from forwardpass.repository import batch_size
from forwardpass.repository.batch_size import BUDGET, clock_of, measure
from forwardpass.repository.knee import LONGEST_RUN, SIZES
from forwardpass.testing.server_process import ServerProcess


def elementwise(op: str, *shape: int | str, element: int = TensorProto.FLOAT) -> object:
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"])],
        "elementwise",
        [helper.make_tensor_value_info("x", element, shape)],
        [helper.make_tensor_value_info("y", element, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_what_is_told_is_taken_without_a_run(tmp_path: Path) -> None:
    found = session(elementwise("Neg", "batch", 4), tmp_path)  # type: ignore[arg-type]
    assert batch_size.choose(found.signature, found, 7, None) == (7, "")
    assert batch_size.choose(found.signature, found, 0, None) == (0, "")


def test_what_is_not_told_is_measured(tmp_path: Path) -> None:
    found = session(elementwise("Neg", "batch", 4), tmp_path)  # type: ignore[arg-type]
    rows, why = batch_size.choose(found.signature, found, None, None)
    assert rows in SIZES
    assert why.startswith(f"max_batch_size {rows} measured, the least power of four that is enough: a row takes ")
    assert re.search(r" of 1, .* of 4, .* of 16, .* of 64, .*; a run .*s \+ .*s a row$", why), why


def test_real_rows_are_measured_where_there_are_some(tmp_path: Path) -> None:
    # An index into a table of three: made-up rows are small integers, but only the sample is certain to be inside.
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        "lookup",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["batch", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1, 2])],
        [helper.make_tensor("table", TensorProto.FLOAT, [1, 2], [1.0, 2.0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    found = session(model, tmp_path)
    assert batch_size.choose(found.signature, found, None, [np.zeros((3, 1), np.int64)])[0] in SIZES
    rows, why = batch_size.choose(found.signature, found, None, [np.full((3, 1), 9)])
    assert rows == batch_size.UNMEASURED
    assert why.startswith("max_batch_size 64: it could not be measured: the network cannot be run on these values")


def test_a_network_without_a_batch_is_not_measured(tmp_path: Path) -> None:
    found = session(elementwise("Neg", 1, 4), tmp_path)  # type: ignore[arg-type]
    assert batch_size.choose(found.signature, found, None, None) == (batch_size.UNMEASURED, "")


def test_batches_of_large_rows_stay_small(tmp_path: Path) -> None:
    # Rows of 4 MiB: no batch beyond 16 MiB is made up, whatever it would gain.
    found = session(elementwise("Neg", "batch", 1 << 20), tmp_path)  # type: ignore[arg-type]
    assert batch_size.choose(found.signature, found, None, None)[0] in (1, 4)


@pytest.mark.parametrize(
    ("options", "toml", "expected"),
    [((), None, None), (("--max-batch-size", "24"), None, 24), (("--max-batch-size", "24"), 48, 48)],
    ids=["nobody", "the server", "the model"],
)
def test_the_server_says_what_it_chose(
    tmp_path: Path, digits_repository: Path, options: tuple[str, ...], toml: int | None, expected: int | None
) -> None:
    shutil.copytree(digits_repository / "digits" / "1", tmp_path / "digits" / "1")
    if toml is not None:
        (tmp_path / "digits" / "model.toml").write_text(f"max_batch_size = {toml}\n")
    with ServerProcess(tmp_path, *options) as server:
        line = next(line for line in server.lines if line.startswith("model digits"))
    said = re.search(r"batches of up to (\d+) rows", line)
    assert said is not None, line
    if expected is not None:
        assert int(said[1]) == expected and "measured" not in line
    else:
        assert int(said[1]) in SIZES
        assert f"max_batch_size {said[1]} measured, the least power of four that is enough: a row takes " in line


class Machine:
    """Runs that take `seconds(rows)` of a clock that only they move."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.runs: list[int] = []

    def run(self, rows: int) -> None:
        self.runs.append(rows)
        self.now += self.seconds(rows)

    def measure(self, most: int = SIZES[-1]) -> list[tuple[int, float]]:
        def clock() -> float:
            return self.now

        return measure(self.run, clock, clock, most)


def test_the_quickest_of_many_runs_count() -> None:
    rng = np.random.default_rng(0)
    machine = Machine(lambda rows: (20e-6 + rows * 1e-6) * (1.0 if rng.random() < 0.2 else 1 + rng.random()))
    found = machine.measure()
    assert [rows for rows, _ in found[:5]] == list(SIZES[:5])
    assert all(seconds == pytest.approx(20e-6 + rows * 1e-6, rel=0.02) for rows, seconds in found)


def test_sizes_take_turns_so_that_a_bad_moment_hits_all_of_them() -> None:
    machine = Machine(lambda rows: 20e-6 + rows * 1e-6)
    machine.measure()
    rounds = machine.runs[len(machine.runs) // 2 :]
    changes = sum(a != b for a, b in itertools.pairwise(rounds))
    assert changes >= len(rounds) // 3 - 1


def test_a_bad_moment_as_long_as_a_size_takes_is_forgotten() -> None:
    # Twice as slow at first, for longer than it takes to climb through the sizes.
    machine = Machine(lambda rows: (2.0 if machine.now < 0.1 else 1.0) * (20e-6 + rows * 5e-6))
    assert all(seconds == pytest.approx(20e-6 + rows * 5e-6) for rows, seconds in machine.measure())


@pytest.mark.parametrize(("call", "row"), [(1e-6, 1e-7), (5e-3, 0.5e-3), (0.1, 0.01), (0.3, 0.3), (2.0, 0.0)])
def test_measuring_keeps_to_its_budget(call: float, row: float) -> None:
    machine = Machine(lambda rows: call + row * rows)
    found = machine.measure()
    longest = max(LONGEST_RUN, 4 * machine.seconds(1))
    assert all(machine.seconds(rows) <= longest for rows, _ in found)
    twice = 2 * sum(machine.seconds(rows) for rows, _ in found)
    assert machine.now <= twice + BUDGET + longest + 0.05


def test_a_bad_moment_does_not_end_the_climb_for_good() -> None:
    machine = Machine(lambda rows: (3.0 if rows >= 64 and machine.now < 0.01 else 1.0) * (20e-6 + rows * 1e-6))
    assert [rows for rows, _ in machine.measure()] == list(SIZES)


def test_a_clock_that_counts_a_few_runs_short_changes_nothing() -> None:
    machine = Machine(lambda rows: (0.5 if len(machine.runs) % 97 == 0 else 1.0) * (20e-6 + rows * 5e-6))
    assert all(seconds == pytest.approx(20e-6 + rows * 5e-6) for rows, seconds in machine.measure())


def test_no_more_rows_than_there_may_be() -> None:
    assert [rows for rows, _ in Machine(lambda _: 50e-6).measure(5)] == [1, 4]


def test_what_a_run_raises_is_passed_on() -> None:
    def fails(rows: int) -> None:
        raise RuntimeError("no such size")

    with pytest.raises(RuntimeError, match="no such size"):
        measure(fails, lambda: 0.0, lambda: 0.0)


@pytest.mark.parametrize(
    ("placement", "clock"),
    [
        (place("cpu", 1, ""), time.thread_time),
        (place("cpu", 2, ""), time.perf_counter),
        (place("cpu", 1, "", shared=True), time.perf_counter),
        (Placement("CUDAExecutionProvider", 0, 1, "", devices=(0,)), time.perf_counter),
    ],
)
def test_processor_time_is_taken_where_the_calling_thread_does_it_all(
    placement: Placement, clock: Callable[[], float]
) -> None:
    assert clock_of(placement) is clock
