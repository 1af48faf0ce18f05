"""`forwardpass serve` on a CUDA device that is ordinary memory: python -m tests.service.on_fake_device FOLDER OPTIONS.

A file in FOLDER says what becomes of runs: `lost` breaks the device for good; `short` lets one run find no memory. The
rest of the command line is the server's own.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.unit.fake_device import ILLEGAL_ADDRESS, FakeDriver, FakeRuntime, cuda_failure

from forwardpass.cli.main import main
from forwardpass.execution.cuda.session import CudaSession
from forwardpass.execution.placement import Devices, Placement
from forwardpass.execution.providers import place
from forwardpass.repository import repository
from forwardpass.repository.loader import load
from forwardpass.server import server


def serve(folder: Path, arguments: list[str]) -> int:
    driver = FakeDriver(devices=2)
    runtime = FakeRuntime(driver)

    def before() -> None:
        if (folder / "short").exists():
            (folder / "short").unlink()
            raise cuda_failure(2, "out of memory")
        if (folder / "lost").exists():
            driver.sticky = ILLEGAL_ADDRESS
            raise cuda_failure(700, "an illegal memory access was encountered")

    def opens(path: Path, where: Placement, optimizations: str, name: str, _opening: Any) -> CudaSession:
        return CudaSession(path, where, optimizations, driver=driver, opener=runtime, name=name)

    runtime.before = before
    repository.load = lambda request: load(replace(request, opens=opens, look=lambda: Devices(2)))
    server.place = partial(place, look=lambda: Devices(2))
    return main(["serve", *arguments])


if __name__ == "__main__":
    sys.exit(serve(Path(sys.argv[1]), sys.argv[2:]))
