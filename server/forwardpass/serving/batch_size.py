"""How many rows one matrix has: as told, else measured on the network as it is opened, in well under a second.

Nothing is kept from one start to the next: the machine, or its neighbours, may be others then.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import RequestError
from forwardpass.serving.interface import Interface
from forwardpass.serving.invariance import example
from forwardpass.serving.knee import ENOUGH, MOST_ROWS, knee, measure
from forwardpass.serving.session import Network

UNMEASURED = 64  # rows where the network can't be run on made-up values
MOST_BYTES = 16 << 20  # of the inputs of a batch that is tried, beyond one row


def choose(
    interface: Interface, session: Network, told: int | None, samples: Sequence[NDArray[Any]] | None
) -> tuple[int, str]:
    """Rows of a full matrix, and where that is from, in words; no words where it is as `told`.

    `samples`: real rows per input, if known. A network without a batch is not measured.
    """
    if told is not None:
        return told, ""
    if not interface.batchable:
        return UNMEASURED, ""
    rng = np.random.default_rng(0)
    one = [example(t, 1, rng) if samples is None else samples[i][:1] for i, t in enumerate(interface.inputs)]
    made: dict[int, list[NDArray[Any]]] = {}

    def run(rows: int) -> None:
        if rows not in made:
            made.clear()  # one size is there at a time
            made[rows] = [np.repeat(array, rows, axis=0) for array in one]
        session.run(made[rows], interface.default_outputs)

    most = min(MOST_ROWS, max(1, MOST_BYTES // max(1, sum(array.nbytes for array in one))))
    try:
        rows = knee(measure(run, time.perf_counter, most))
    except RequestError as error:
        return UNMEASURED, f"max_batch_size {UNMEASURED}: it could not be measured: {error}"
    return rows, f"max_batch_size {rows} measured: the least with {ENOUGH:.0%} of the best throughput"
