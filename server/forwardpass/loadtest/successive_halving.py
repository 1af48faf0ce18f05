"""Successive halving over a grid of settings: which to measure next, and for how long. Pure: `measure` is passed in.

All settings are measured briefly, the best fifth of them for longer, and so on until the last few are measured at
length. `measure` may return a stored result, of this run or an earlier one, instead of measuring again.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Setting = tuple[tuple[str, int], ...]  # option of model.toml, value; in the grid's order

KEEP = 5  # one in this many settings advances to the next rung
CLOSE = 0.01  # settings that differ by less count as equal, however precise the measurement
FINALISTS = 2  # minimum number measured at length, in addition to the present setting


@dataclass(frozen=True, slots=True)
class Rung:
    """One round: how long each setting is measured, in seconds, and how often. Medians are compared."""

    seconds: float
    repeats: int


RUNGS = (Rung(0.3, 1), Rung(1.2, 1), Rung(4.0, 3))


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of a setting: responses in time a second, and the latency quantile in seconds."""

    in_time: float
    latency: float


class Score:
    """The medians of a setting's samples, compared with another's beyond the samples' own spread."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = tuple(samples)
        self.in_time = statistics.median(sample.in_time for sample in samples)
        self.latency = statistics.median(sample.latency for sample in samples)

    def more_in_time(self, other: Score) -> bool:
        """Whether more responses are in time than the other's, beyond CLOSE and in every sample."""
        least, most = min(s.in_time for s in self.samples), max(s.in_time for s in other.samples)
        return least > most and self.in_time > (1.0 + CLOSE) * other.in_time

    def quicker(self, other: Score) -> bool:
        """Whether the latency is lower than the other's, beyond CLOSE and in every sample."""
        most, least = max(s.latency for s in self.samples), min(s.latency for s in other.samples)
        return most < least and self.latency < (1.0 - CLOSE) * other.latency

    def better(self, other: Score) -> bool:
        """Whether more are in time, or as many with lower latency. A difference within the noise does not count."""
        return self.more_in_time(other) or (not other.more_in_time(self) and self.quicker(other))


Measure = Callable[[Setting, Rung, int], Sample]  # the int numbers a setting's measurements on a rung, from 0


def grid(options: Mapping[str, Sequence[int]]) -> list[Setting]:
    """Every combination of the options' values."""
    return [tuple(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def best(scores: Mapping[Setting, Score]) -> Setting:
    """The setting with the lowest latency among those whose responses in time equal the maximum within the noise."""
    top = max(scores.values(), key=lambda score: score.in_time)
    close = [setting for setting, score in scores.items() if not top.more_in_time(score)]
    return min(close, key=lambda setting: scores[setting].latency)


def choose(scores: Mapping[Setting, Score], present: Setting) -> Setting:
    """The best setting, if it is better than the present one; else the present one."""
    found = best(scores)
    return found if scores[found].better(scores[present]) else present


def search(settings: Sequence[Setting], measure: Measure, rungs: Sequence[Rung] = RUNGS) -> list[dict[Setting, Score]]:
    """The scores of each rung; the winner is in the last. The first setting, the present one, is in every rung."""
    found: list[dict[Setting, Score]] = []
    left = list(settings)
    for number, rung in enumerate(rungs):
        found.append(measured(left, measure, rung))
        if number + 1 < len(rungs):
            keep = max(FINALISTS, math.ceil(len(left) / KEEP))
            ranked = _ranked(found[-1], keep)
            left = [settings[0], *[setting for setting in ranked if setting != settings[0]]]
    return found


def measured(settings: Sequence[Setting], measure: Measure, rung: Rung) -> dict[Setting, Score]:
    """Measure the settings in turn, so that drift of the machine affects all of them."""
    samples: dict[Setting, list[Sample]] = {setting: [] for setting in settings}
    for turn in range(rung.repeats):
        for setting in settings:
            samples[setting].append(measure(setting, rung, turn))
    return {setting: Score(of_it) for setting, of_it in samples.items()}


def _ranked(scores: Mapping[Setting, Score], count: int) -> list[Setting]:
    """The `count` best settings, best first: `best` applied repeatedly to the remaining ones."""
    left = dict(scores)
    found: list[Setting] = []
    while left and len(found) < count:
        found.append(best(left))
        del left[found[-1]]
    return found
