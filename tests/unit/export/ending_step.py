"""A step for `test_child_process`, which ends in the way that its argument says."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from forwardpass.errors import ExportError
from forwardpass.export.child_process import serve_parent


def step(begin: Callable[[str], None]) -> None:
    begin("doing the first thing")
    begin("doing the second thing")
    match sys.argv[1:]:
        case ["write", path]:
            Path(path).write_text("written")
        case ["crash", number]:
            os.kill(os.getpid(), int(number))
        case ["hang"]:
            time.sleep(600)
        case ["refuse"]:
            raise ExportError("the network is not of that kind:\nit has no layers")
        case _:
            print(1 / 0)


if __name__ == "__main__":
    sys.exit(serve_parent(step))
