"""A process of its own for the staging tests: they kill it, race it, and take the disk from it. No torch in here.

Its arguments are an action, a repository, and numbers:
`publish` TIMES publishes versions of the model `m`; `hold` stages a file, prints the folder and waits to be killed;
`no-space` SIZE LIMIT publishes a model of SIZE bytes where no file may exceed LIMIT, and prints the error;
`lines` publishes in children that die at the first, second, ... line of it.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from forwardpass.errors import ExportError
from forwardpass.export import staged_version as staging_module
from forwardpass.export.staged_version import StagedVersion
from forwardpass.model.contract import CONTRACT_FILE, Contract, Samples, Tolerance, file_digest
from forwardpass.model.contract_tensor import ContractTensor

SPEC = ContractTensor(name="x", datatype="FP32", shape=[-1])


def stage_and_publish(repository: Path, content: bytes) -> Path:
    """What the exporter does, with the network left out."""
    with StagedVersion(repository, "m") as staging:
        digest = file_digest(staging.write("model.onnx", content))

        def finish(folder: Path, number: int) -> None:
            row = np.zeros(1, np.float32)
            Contract(
                model="m",
                version=number,
                files={"model.onnx": digest},
                inputs=[SPEC],
                outputs=[SPEC.model_copy(update={"name": "y"})],
                batchable=True,
                batch_invariant=True,
                opset=20,
                torch="",
                onnxruntime="",
                provider="",
                samples=Samples.from_arrays(1, {"x": row}, {"y": row.astype(np.float64)}),
                tolerance=Tolerance(rtol=0, atol=0),
                largest_difference=0,
            ).save(folder / CONTRACT_FILE)

        return staging.publish(finish)


def hold(repository: Path) -> None:
    with StagedVersion(repository, "m") as staging:
        staging.write("model.onnx", b"half")
        print(staging.folder, flush=True)
        signal.pause()


def without_space(repository: Path, size: int, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        stage_and_publish(repository, b"\1" * size)
    except ExportError as error:
        print(error)


def die_at_every_line(repository: Path) -> None:
    """For each n: a child that kills itself when it comes to the n-th line of staged_version.py or contract.py.

    Each child finds version 1 and one leftover to sweep. Prints how many died, and the highest version after each, once
    all that were there have been verified.
    """
    model = repository / "m"
    stage_and_publish(repository, b"old")
    seen: list[int] = []
    died = 0
    while True:
        with StagedVersion(repository, "m"):
            pass  # sweeps what the last child left: else they gather faster than a dying sweep removes them
        leftover = model / f"{staging_module.PREFIX}0"
        leftover.mkdir(parents=True)
        (leftover / "model.onnx").write_bytes(b"half")
        child = os.fork()
        if child == 0:
            sys.settrace(_killer(died + 1))
            stage_and_publish(repository, bytes([died % 256]) * 1000)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        numbers = staging_module.versions(model)
        for number in numbers:
            place = model / str(number)
            contract = Contract.load(place / CONTRACT_FILE)
            contract.verify_files(place)
            assert contract.version == number
        assert numbers in ([1], [1, 2])
        seen.append(numbers[-1])
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        died += 1
        if numbers == [1, 2]:
            shutil.rmtree(model / "2")
    print(died, *seen)


def _killer(count: int) -> Any:
    left = count
    watched = {staging_module.__file__, Contract.save.__code__.co_filename}

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in watched:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def main(action: str, repository: Path, *rest: str) -> None:
    if action == "publish":
        for _ in range(int(rest[0])):
            print(stage_and_publish(repository, os.urandom(1000)).name)
    elif action == "no-space":
        without_space(repository, *map(int, rest))
    else:
        {"hold": hold, "lines": die_at_every_line}[action](repository)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
