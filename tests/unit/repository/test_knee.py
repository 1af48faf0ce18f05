"""The knee: which batch is enough, on curves that are formulas and on recorded ones, and which sizes are measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwardpass.repository.knee import (
    LONGEST_RUN,
    PATIENCE,
    RUN_COST,
    SIZES,
    SURPLUS,
    Line,
    describe,
    knee,
    line,
    next_size,
    undecided,
)

# Curves of 20 starts of several networks beside other work, and of 20 with a busy loop on each of the two cores.
RECORDED = json.loads((Path(__file__).parent / "recorded_curves.json").read_text())


def curve(call: float, row: float) -> list[tuple[int, float]]:
    return [(rows, call + row * rows) for rows in SIZES]


@pytest.mark.parametrize(
    ("call", "row", "expected"),
    [
        # A row's surplus of 12 % is reached at (8 + 20) / 0.12 = 233 times what it costs in an endless batch.
        (8e-6, 1e-6, 256),
        (8e-6, 4e-6, 64),
        (1e-3, 1e-9, SIZES[-1]),  # all call: as many rows as there may be
        (0.0, 1e-3, 1),  # next to no call: every batch is as good as one row
    ],
)
def test_the_knee_of_a_call_and_its_rows(call: float, row: float, expected: int) -> None:
    assert knee(curve(call, row)) == expected


@pytest.mark.parametrize("network", RECORDED)
@pytest.mark.parametrize("machine", ["shared", "busy"])
def test_noise_does_not_move_it(network: str, machine: str) -> None:
    curves = RECORDED[network][machine]
    assert len(curves) == 20
    assert {knee((rows, seconds) for rows, seconds in times) for times in curves} == {RECORDED[network]["knee"]}


def test_a_network_that_another_machine_runs_at_a_third_of_the_speed() -> None:
    # 1024-4096-4096-1000: 1,906 µs a row at 8, 1,586 at 16, 1,426 at 64.
    assert knee([(8, 8 * 1906e-6), (16, 16 * 1586e-6), (64, 64 * 1426e-6)]) == 64


def test_a_slower_moment_of_the_machine_cancels_out() -> None:
    # Where only the network counts; what the server adds to a run is taken to be the same.
    times = curve(3e-3, 0.1e-3)
    assert {knee([(rows, seconds * slower) for rows, seconds in times]) for slower in (0.8, 1.0, 1.5, 2.0)} == {256}


def test_one_measurement_that_is_off_does_not_move_it() -> None:
    times = curve(300e-6, 30e-6)
    assert knee(times) == 256
    for spoilt in range(1, len(times)):
        for by in (0.93, 1.07):
            assert knee([(n, t * by if i == spoilt else t) for i, (n, t) in enumerate(times)]) == 256


def test_the_longer_a_run_the_less_is_worth_waiting_for() -> None:
    # The same surplus at every size, for runs that take 0.04, 4 and 40 ms at 16 rows.
    assert [knee(curve(2.2 * row, row)) for row in (0.25e-3, 0.25e-2)] == [64, 16]
    fitted = line(curve(2.2 * 0.25e-2, 0.25e-2))
    assert fitted.surplus(16) > SURPLUS and fitted.enough(16)
    assert fitted.surplus(16) == pytest.approx((2.2 * 0.25e-2 + RUN_COST) / (16 * 0.25e-2))
    assert fitted.surplus(16) <= SURPLUS * (1 + fitted.seconds(16) / PATIENCE)


def test_the_order_of_the_times_does_not_matter() -> None:
    times = [(64, 64e-5), (1, 9e-5), (16, 18e-5)]
    assert knee(times) == knee(reversed(times))


def test_a_larger_batch_that_is_slower_is_not_taken() -> None:
    # Beyond 64 rows the caches overflow.
    assert knee([(1, 1e-4), (4, 1.3e-4), (16, 2.3e-4), (64, 5e-4), (256, 100e-4)]) == 64
    assert knee([(1, 1e-4), (4, 6e-4), (16, 25e-4)]) == 1


def test_what_the_server_adds_to_a_run_counts() -> None:
    # By itself, a lone row is as quick as any; with a run's cost in the server it is not.
    assert knee(curve(0.0, 2e-6)) == 256


def test_a_lone_row_is_no_part_of_the_line() -> None:
    # It runs as a product with a vector, three times as slow as a row of a batch.
    times = [(1, 78e-6), *curve(2e-6, 27.5e-6)[1:]]
    fitted = line(times)
    assert (fitted.call, fitted.row) == (pytest.approx(2e-6), pytest.approx(27.5e-6))
    assert knee(times) == 16


def test_no_times_have_no_knee() -> None:
    with pytest.raises(ValueError, match="no batch"):
        knee([])


@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(0, 10)), min_size=1, unique_by=lambda time: time[0]))
def test_the_knee_is_one_of_the_measured_sizes(times: list[tuple[int, float]]) -> None:
    assert knee(times) in {rows for rows, _ in times}


@given(st.lists(st.floats(1e-6, 1), min_size=2, max_size=6))
def test_a_line_never_falls(seconds: list[float]) -> None:
    fitted = line(list(zip(SIZES, seconds, strict=False)))
    assert fitted.call >= 0.0 and fitted.row >= 0.0 and np.isfinite(fitted.seconds(1024))


def measured(run: Line, most: int = SIZES[-1]) -> list[int]:
    times: list[tuple[int, float]] = []
    while (rows := next_size(times, most)) is not None:
        times.append((rows, run.seconds(rows)))
    return [rows for rows, _ in times]


@pytest.mark.parametrize(("call", "expected"), [(18e-6, False), (38e-6, True), (42e-6, True), (80e-6, False)])
def test_a_close_choice_is_measured_for_longer(call: float, expected: bool) -> None:
    # With 20 µs of the server's, 60 µs are 12 % of 16 rows of 31 µs.
    assert undecided(curve(call, 31e-6)[:4]) is expected


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (Line(8e-6, 1e-6), [1, 4, 16, 64, 256, 1024]),
        (Line(3e-3, 0.5e-3), [1, 4, 16, 64, 256]),  # one more than the knee, which is 64
        (Line(0.0, 1e-3), [1, 4, 16, 64]),  # as many as a line is judged by, though the knee is 1
        (Line(0.086, 0.0147), [1, 4, 16]),  # 64 rows would take a second
        (Line(0.6, 0.01), [1, 4, 16, 64]),  # of 256 it would be more than four lone rows
        (Line(0.0, 2.0), [1, 4]),
    ],
)
def test_sizes_are_measured_up_to_where_it_flattens(run: Line, expected: list[int]) -> None:
    assert measured(run) == expected
    longest = max(LONGEST_RUN, 4 * run.seconds(1))
    assert all(run.seconds(rows) <= longest for rows in expected)


def test_no_more_rows_than_allowed() -> None:
    assert measured(Line(50e-6, 1e-9), 5) == [1, 4]


def test_one_row_of_a_slow_network_takes_long_and_yet_it_is_batched() -> None:
    run = Line(0.086, 0.0147)  # 9.9 rows/s alone, 50 at 16
    assert knee([(rows, run.seconds(rows)) for rows in measured(run)]) == 16


def test_the_curve_is_printed() -> None:
    said = describe([(1, 5e-3), (4, 6e-3), (16, 12e-3)])
    assert said == "a row takes 5 ms of 1, 1.5 ms of 4, 750 µs of 16; a run 4 ms + 500 µs a row"
