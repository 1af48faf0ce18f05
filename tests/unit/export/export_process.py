"""A process of its own that exports for real, in children that are killed at moments spread over an export.

    python export_process.py KILLS REPOSITORY

A moment is one of the thousands of steps that Python reports to its audit hooks (code compiled, a file opened), so
that the same places of the export are hit however busy the machine is. Prints, for each child, the step before which
it was killed, and the highest version after it, once all that were there have been verified. PyTorch is loaded before
the children begin, so that they are killed exporting.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from forwardpass.export import export
from forwardpass.export.staged_version import versions
from forwardpass.model.contract import CONTRACT_FILE, Contract
from networks import Mlp

INPUTS = ["x:float32[batch,5]"]


class Counter:
    """Counts the steps of this process, and kills it before the one numbered `last`."""

    def __init__(self, last: int = 0) -> None:
        self.steps = 0
        self._last = last
        sys.addaudithook(self._hear)

    def _hear(self, _event: str, _arguments: object) -> None:
        self.steps += 1
        if self.steps == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


def exporting(repository: Path, last: int = 0) -> int:
    """Export in a child that is killed before its step `last`; the steps that it took, 0 where it was killed."""
    mine, its = os.pipe()
    child = os.fork()
    if child == 0:
        counter = Counter(last)
        export(Mlp(), INPUTS, "m", repository)
        os.write(its, str(counter.steps).encode())
        os._exit(0)
    os.close(its)
    with os.fdopen(mine) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == (0 if told else signal.SIGKILL), status
    return int(told or 0)


def main(kills: int, repository: Path) -> None:
    torch.set_num_threads(1)  # no thread to lose in a fork
    export(Mlp(), INPUTS, "m", repository)
    length = exporting(repository)
    for kill in range(kills):
        if (repository / "m" / "2").exists():
            shutil.rmtree(repository / "m" / "2")
        step = 1 + int(1.2 * length * kill / kills)  # a little over an export's length, so that some come through
        exporting(repository, step)
        numbers = versions(repository / "m")
        assert numbers in ([1], [1, 2])
        for number in numbers:
            place = repository / "m" / str(number)
            contract = Contract.load(place / CONTRACT_FILE)
            contract.verify_files(place)
            assert contract.version == number
        print(f"{step} {numbers[-1]}")
    shutil.rmtree(repository / "m" / "2")
    export(Mlp(), INPUTS, "m", repository)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
