"""The knee: which batch is enough, and that measuring it ends, whatever the runs are like. On a clock of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwardpass.serving.knee import BUDGET, ENOUGH, LONGEST_RUN, MOST_ROWS, RUN_COST, knee, measure, throughput


class Machine:
    """Runs that take `seconds(rows)` of a clock that only they move."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.runs: list[int] = []

    def run(self, rows: int) -> None:
        self.runs.append(rows)
        self.now += self.seconds(rows)

    def measure(self) -> list[tuple[int, float]]:
        return measure(self.run, lambda: self.now)


@pytest.mark.parametrize(
    ("call", "row", "expected"),
    [
        # 90% of 1/row is reached at nine times what a run costs whatever its rows: 9 * (8 + 20) / 1 = 252 rows.
        (8e-6, 1e-6, 256),
        (8e-6, 4e-6, 64),
        (1e-3, 1e-9, MOST_ROWS),  # all call: as many rows as there may be
        (0.0, 1e-3, 1),  # next to no call: every batch is as good as one row
    ],
)
def test_the_knee_of_a_call_and_its_rows(call: float, row: float, expected: int) -> None:
    times = [(1 << i, call + row * (1 << i)) for i in range(11)]
    assert knee(times) == expected
    best = max(throughput(rows, seconds) for rows, seconds in times)
    assert throughput(expected, dict(times)[expected]) >= ENOUGH * best
    assert all(throughput(rows, seconds) < ENOUGH * best for rows, seconds in times if rows < expected)


def test_the_order_of_the_times_does_not_matter() -> None:
    times = [(64, 64e-5), (1, 9e-5), (8, 12e-5)]
    assert knee(times) == knee(reversed(times)) == 64


def test_a_larger_batch_that_is_slower_is_not_taken() -> None:
    # Beyond 32 rows the caches overflow.
    assert knee([(16, 20e-5), (32, 30e-5), (64, 90e-5), (128, 200e-5)]) == 32


def test_what_the_server_adds_to_a_run_counts() -> None:
    # By themselves, 16 rows are as quick as 64; with a run's cost in the server they are not.
    assert knee([(16, 8e-6), (64, 32e-6)]) == 64
    assert throughput(16, 8e-6) == pytest.approx(16 / (8e-6 + RUN_COST))


def test_no_times_have_no_knee() -> None:
    with pytest.raises(ValueError, match="no batch"):
        knee([])


@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(0, 10)), min_size=1, unique_by=lambda time: time[0]))
def test_the_knee_is_one_of_the_measured_sizes(times: list[tuple[int, float]]) -> None:
    assert knee(times) in {rows for rows, _ in times}


def test_sizes_double_up_to_the_most_rows() -> None:
    machine = Machine(lambda _: 50e-6)
    assert [rows for rows, _ in machine.measure()] == [1 << i for i in range(MOST_ROWS.bit_length())]


def test_the_first_run_of_a_size_does_not_count() -> None:
    seen: set[int] = set()

    def seconds(rows: int) -> float:
        first = rows not in seen
        seen.add(rows)
        return 1e-3 if first else 10e-6 + rows * 1e-6

    for rows, fastest in Machine(seconds).measure():
        assert fastest == pytest.approx(10e-6 + rows * 1e-6)


def test_it_stops_where_doubling_gains_no_more() -> None:
    machine = Machine(lambda rows: 1e-3 * rows)
    assert [rows for rows, _ in machine.measure()] == [1, 2, 4]


def test_no_more_rows_than_allowed() -> None:
    machine = Machine(lambda _: 50e-6)
    assert [rows for rows, _ in measure(machine.run, lambda: machine.now, 5)] == [1, 2, 4]


def test_a_batch_that_takes_too_long_is_left_out() -> None:
    machine = Machine(lambda rows: 1e-4 if rows < 64 else 2 * LONGEST_RUN)
    assert [rows for rows, _ in machine.measure()] == [1, 2, 4, 8, 16, 32]
    assert machine.runs[-2:] == [64, 64]  # tried, and given up after the first run that counts


def test_the_slowest_of_networks_is_measured_once_and_not_again() -> None:
    machine = Machine(lambda _: 1.0)
    assert machine.measure() == [(1, pytest.approx(1.0))]
    assert machine.runs == [1, 1]


@given(st.floats(0, 0.05), st.floats(0, 0.001))
def test_measuring_keeps_to_its_budget(call: float, row: float) -> None:
    # Every run moves the clock a little, as a real one does.
    machine = Machine(lambda rows: 1e-6 + call + row * rows)
    measured = machine.measure()
    assert measured
    longest = max(machine.seconds(rows) for rows in machine.runs)
    assert machine.now <= BUDGET + 3 * longest


def test_what_a_run_raises_is_passed_on() -> None:
    def fails(rows: int) -> None:
        raise RuntimeError("no such size")

    with pytest.raises(RuntimeError, match="no such size"):
        measure(fails, lambda: 0.0)
