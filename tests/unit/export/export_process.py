"""A process of its own that exports for real, in children that are killed at moments spread over an export.

    python export_process.py KILLS REPOSITORY

Prints, for each child, when it was killed as a part of an export's length, and the highest version after it, once all
that were there have been verified. PyTorch is loaded before the children begin, so that they are killed exporting.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from forwardpass.contract import CONTRACT_FILE, Contract
from forwardpass.export import export
from forwardpass.export.staging import versions
from networks import Mlp

INPUTS = ["x:float32[batch,5]"]


def main(kills: int, repository: Path) -> None:
    torch.set_num_threads(1)  # no thread to lose in a fork
    network = Mlp()
    export(network, INPUTS, "m", repository)
    started = time.perf_counter()
    export(network, INPUTS, "m", repository, version=1000)
    length = time.perf_counter() - started
    shutil.rmtree(repository / "m" / "1000")
    for kill in range(kills):
        # A little over an export's length, so that some come through.
        part = 1.2 * (kill + 0.5) / kills
        child = os.fork()
        if child == 0:
            export(network, INPUTS, "m", repository)
            os._exit(0)
        time.sleep(part * length)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        numbers = versions(repository / "m")
        assert numbers in ([1], [1, 2])
        for number in numbers:
            place = repository / "m" / str(number)
            contract = Contract.load(place / CONTRACT_FILE)
            contract.verify_files(place)
            assert contract.version == number
        print(f"{part:.2f} {numbers[-1]}")
        if numbers == [1, 2]:
            shutil.rmtree(repository / "m" / "2")
    export(network, INPUTS, "m", repository)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
