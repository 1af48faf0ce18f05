"""Successive halving on measurements that are formulas: what it finds, what it costs, what it keeps."""

from __future__ import annotations

import numpy as np

from forwardpass.loadtest import halving
from forwardpass.loadtest.halving import RUNGS, Rung, Score, Setting

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

    def measure(setting: Setting, rung: Rung) -> Score:
        nonlocal spent
        spent += rung.seconds * rung.repeats
        # The longer it is measured, the less noise: 2 % in a second.
        noise = 1 + 0.02 * generator.normal() / (rung.seconds * rung.repeats) ** 0.5
        return Score(_true(setting) * noise, 0.001)

    settings = halving.grid(OPTIONS)
    assert len(settings) == 36
    rungs = halving.search(settings, measure)
    winner = halving.best(rungs[-1])
    assert _true(winner) >= 0.97 * max(map(_true, settings))
    assert spent < 0.15 * len(settings) * RUNGS[-1].seconds * RUNGS[-1].repeats


def test_the_present_setting_is_measured_to_the_end() -> None:
    settings = sorted(halving.grid(OPTIONS), key=_true)  # the worst first
    rungs = halving.search(settings, lambda setting, _: Score(_true(setting), 0.001))
    assert [len(rung) for rung in rungs] == [36, 9, 3]
    assert all(settings[0] in rung for rung in rungs)
    assert halving.best(rungs[-1]) == settings[-1]


def test_of_equals_the_quicker_one_is_chosen() -> None:
    slow, quick, poor = ((("a", n),) for n in range(3))
    scores = {slow: Score(1000, 0.004), quick: Score(995, 0.001), poor: Score(900, 0.0001)}
    assert halving.best(scores) == quick
