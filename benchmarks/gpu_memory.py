"""Batches of mixed sizes through one session: the device's memory must stay as it is, and every answer be right.

What runs them, what is expected and what memory is taken are passed in: the same check serves bench_gpu.py, tests/gpu
and its own test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What has been seen to upset caches of sizes: a full batch, some below it, repeats, one, then a large one again.
AWKWARD = (16, 7, 7, 1, 64, 3, 33, 64, 2, 1, 63, 32, 31, 5, 64, 1)
SAMPLES = 100  # looks at the memory, evenly over the batches
WARM_UP = 0.1  # of the batches, after which memory must not grow

Array = NDArray[Any]


@dataclass(slots=True)
class Flat:
    """What came of it."""

    batches: int
    wrong: int = 0  # batches with an answer beyond the tolerance
    difference: float = 0.0  # the largest of all
    used: list[int] = field(default_factory=list)  # bytes taken on the device, at each look

    @property
    def growth(self) -> int:
        """Bytes by which the most that was taken after the warm-up exceeds what was taken at its end."""
        return growth(self.used)


def growth(used: list[int]) -> int:
    """Of what was taken at each look: by how much the most after the warm-up exceeds what was taken at its end."""
    after = used[round(WARM_UP * len(used)) :]
    return max(after) - after[0] if after else 0


def mixed(
    run: Callable[[Array], Array],
    rows: Array,
    expected: Array,
    largest: int,
    batches: int,
    used: Callable[[], int],
    rtol: float,
    atol: float,
) -> Flat:
    """`batches` batches of 1 to `largest` of `rows` [N, D_in], whose answers are `expected` [N, D_out].

    `run`: a batch to its answers. `used`: bytes that are taken on the device.
    """
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, largest + 1, batches)
    awkward = [size for size in AWKWARD if size <= largest]
    sizes[: len(awkward)] = awkward[:batches]
    starts = generator.integers(0, len(rows) - sizes + 1)
    allowed = atol + rtol * np.abs(expected)
    found = Flat(batches)
    every = max(1, batches // SAMPLES)
    for i, (size, start) in enumerate(zip(sizes.tolist(), starts.tolist(), strict=True)):
        taken = slice(start, start + size)
        apart = np.abs(run(rows[taken]) - expected[taken])
        found.wrong += not bool((apart <= allowed[taken]).all())  # NaN is not within anything
        found.difference = max(found.difference, float(apart.max()))
        if i % every == every - 1:
            found.used.append(used())
    return found
