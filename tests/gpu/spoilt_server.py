"""`forwardpass serve` that, on SIGUSR1, does to its CUDA device what nothing in the process survives.

python tests/gpu/spoilt_server.py REPOSITORY OPTION...
"""

from __future__ import annotations

import importlib.util
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from forwardpass.cli.main import main


def _libcuda() -> Any:
    spec = importlib.util.spec_from_file_location("libcuda", Path(__file__).with_name("libcuda.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    # In a thread: the main thread's own device context is none of the driver's business.
    signal.signal(signal.SIGUSR1, lambda *_: threading.Thread(target=_libcuda().spoil).start())
    sys.exit(main(["serve", *sys.argv[1:]]))
