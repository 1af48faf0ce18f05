"""Which settings to measure next, and for how long: successive halving over a grid. Pure: what measures is passed in.

All settings are measured briefly, the best fifth of them for longer, and so on until the last few are measured at
length. What was measured already, in this run or an earlier one, is not measured again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Setting = tuple[tuple[str, int], ...]  # option of model.toml, value; in the grid's order

KEEP = 5  # of as many settings one goes on to the next rung
FINALISTS = 2  # that are measured at length, at least; the present setting comes on top


@dataclass(frozen=True, slots=True)
class Rung:
    """One round: how long a setting is measured, in seconds, and how often. The median counts."""

    seconds: float
    repeats: int


RUNGS = (Rung(0.3, 1), Rung(1.2, 1), Rung(4.0, 3))


@dataclass(frozen=True, slots=True)
class Score:
    """What a setting came to: answers in time a second, and the latency quantile of all answers in seconds."""

    in_time: float
    latency: float


Measure = Callable[[Setting, Rung], Score]


def grid(options: Mapping[str, Sequence[int]]) -> list[Setting]:
    """Every combination."""
    return [tuple(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def best(scores: Mapping[Setting, Score]) -> Setting:
    """The setting with the most answers in time; of those within 1 % of it, the one with the lowest latency."""
    most = max(score.in_time for score in scores.values())
    close = [setting for setting, score in scores.items() if score.in_time >= 0.99 * most]
    return min(close, key=lambda setting: scores[setting].latency)


def search(settings: Sequence[Setting], measure: Measure, rungs: Sequence[Rung] = RUNGS) -> list[dict[Setting, Score]]:
    """The scores of each rung; the winner is `best` of the last. The first setting, the present one, is in all."""
    found: list[dict[Setting, Score]] = []
    left = list(settings)
    for number, rung in enumerate(rungs):
        found.append({setting: measure(setting, rung) for setting in left})
        if number + 1 < len(rungs):
            keep = max(FINALISTS, math.ceil(len(left) / KEEP))
            ranked = sorted(left, key=lambda setting: found[-1][setting].in_time, reverse=True)
            left = [settings[0], *[setting for setting in ranked[:keep] if setting != settings[0]]]
    return found
