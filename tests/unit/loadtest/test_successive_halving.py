"""Successive halving on measurements that are formulas: what it finds, what it costs, what it keeps."""

from __future__ import annotations

import numpy as np
import pytest

from forwardpass.loadtest import successive_halving
from forwardpass.loadtest.successive_halving import RUNGS, Rung, Sample, Score, Setting

OPTIONS = {"max_batch_size": (16, 64, 256), "instances": (1, 2), "threads": (1, 2), "delay": (0, 200, 1000)}


def _true(setting: Setting) -> float:
    """The best is a batch of 64, one instance, one thread, no delay."""
    values = dict(setting)
    return (
        1000
        - abs(values["max_batch_size"] - 64)
        - 80 * values["instances"]
        - 50 * values["threads"]
        - values["delay"] / 4
    )


def test_it_finds_the_best_for_less_than_the_grid_despite_noise() -> None:
    generator = np.random.default_rng(0)
    spent = 0.0

    def measure(setting: Setting, rung: Rung, _turn: int) -> Sample:
        nonlocal spent
        spent += rung.seconds
        # The longer it is measured, the less noise: 2 % in a second.
        noise = 1 + 0.02 * generator.normal() / rung.seconds**0.5
        return Sample(_true(setting) * noise, 0.001)

    settings = successive_halving.grid(OPTIONS)
    assert len(settings) == 36
    rungs = successive_halving.search(settings, measure)
    winner = successive_halving.best(rungs[-1])
    assert _true(winner) >= 0.97 * max(map(_true, settings))
    assert spent < 0.15 * len(settings) * RUNGS[-1].seconds * RUNGS[-1].repeats


def test_the_present_setting_is_measured_to_the_end() -> None:
    settings = sorted(successive_halving.grid(OPTIONS), key=_true)  # the worst first
    rungs = successive_halving.search(settings, lambda setting, *_: Sample(_true(setting), 0.001))
    assert [len(rung) for rung in rungs] == [36, 9, 3]
    assert all(settings[0] in rung for rung in rungs)
    assert successive_halving.best(rungs[-1]) == settings[-1]


def score(*samples: tuple[float, float]) -> Score:
    return Score([Sample(*sample) for sample in samples])


def test_of_equals_the_quicker_one_is_chosen() -> None:
    slow, quick, poor = ((("a", n),) for n in range(3))
    scores = {slow: score((1000, 0.004)), quick: score((995, 0.001)), poor: score((900, 0.0001))}
    assert successive_halving.best(scores) == quick


def test_equals_go_on_by_their_latency_and_not_by_their_place_in_the_grid() -> None:
    settings = successive_halving.grid({"a": tuple(range(10))})
    rungs = successive_halving.search(settings, lambda setting, *_: Sample(1000, 0.010 - 0.001 * setting[0][1]))
    assert list(rungs[1]) == [settings[0], settings[9], settings[8]]


def test_the_samples_of_a_rung_take_turns() -> None:
    order: list[tuple[int, int]] = []

    def measure(setting: Setting, _rung: Rung, turn: int) -> Sample:
        order.append((turn, setting[0][1]))
        return Sample(1.0, 1.0)

    successive_halving.measured(successive_halving.grid({"a": (5, 6)}), measure, Rung(1.0, 3))
    assert order == [(0, 5), (0, 6), (1, 5), (1, 6), (2, 5), (2, 6)]


PRESENT, OTHER = (("a", 0),), (("a", 1),)


@pytest.mark.parametrize(
    ("present", "other", "chosen"),
    [
        # Twice as many in time, in every sample.
        ([(500, 0.01), (510, 0.01), (490, 0.01)], [(1000, 0.01), (1010, 0.01), (990, 0.01)], OTHER),
        # More in the median, within the noise.
        ([(950, 0.01), (1005, 0.01), (900, 0.01)], [(1000, 0.01), (1010, 0.01), (990, 0.01)], PRESENT),
        # As many, and quicker beyond the noise.
        ([(1000, 0.010), (990, 0.011), (1010, 0.012)], [(1001, 0.005), (991, 0.006), (1011, 0.004)], OTHER),
        # As many, and quicker within the noise.
        ([(1000, 0.010), (990, 0.005), (1010, 0.012)], [(1001, 0.009), (991, 0.006), (1011, 0.004)], PRESENT),
        # Half a per cent more, measured as well as may be.
        ([(1000, 0.01)] * 3, [(1005, 0.01)] * 3, PRESENT),
        # Quicker, and fewer.
        ([(1000, 0.01)] * 3, [(900, 0.001)] * 3, PRESENT),
        ([(0.0, 1e9)] * 3, [(100, 0.01)] * 3, OTHER),
    ],
)
def test_the_present_setting_stays_unless_another_is_better_beyond_the_noise(
    present: list[tuple[float, float]], other: list[tuple[float, float]], chosen: Setting
) -> None:
    assert successive_halving.choose({PRESENT: score(*present), OTHER: score(*other)}, PRESENT) == chosen
