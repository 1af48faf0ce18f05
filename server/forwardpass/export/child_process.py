"""Runs a step that may crash or hang in native code in a process of its own, so that this is an error with a reason.

The step is a module of this package, started as `python -m MODULE ARGUMENTS`, on files. It prints a line for each stage
that it begins, and raises ForwardpassError for what it refuses; `serve_parent` in it does both.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from forwardpass.errors import ExportError, ForwardpassError

SECONDS = 1800.0  # a stage of minutes is a large network; one of half an hour hangs
_REFUSED = 3  # exit status: the reason is on stderr


def run_step(module: str, arguments: Sequence[str | Path], what: str, seconds: float = SECONDS) -> None:
    """Run the step, and wait for its end. Raises ExportError: refused, ended by a signal, failed or not at an end.

    `what` begins the error, as in "half precision".
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    late = False
    try:
        stages, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        late = True
        process.kill()
        stages, said = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    stage = (stages.strip().splitlines() or ["starting"])[-1]
    lines = said.strip().splitlines()
    if late:
        raise ExportError(f"{what}: not at an end after {seconds:g} s of {stage}; its process was ended")
    if process.returncode == _REFUSED:
        raise ExportError("\n".join(lines))
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise ExportError(f"{what}: its process was ended by {name} while {stage}; nothing was written")
    if process.returncode:
        raise ExportError(f"{what}: failed while {stage}: {lines[-1] if lines else f'status {process.returncode}'}")


def serve_parent(step: Callable[[Callable[[str], None]], None]) -> int:
    """For the child: run `step` with a function that reports a stage. Returns the exit status."""
    try:
        step(lambda stage: print(stage, flush=True))
    except ForwardpassError as error:
        print(error, file=sys.stderr)
        return _REFUSED
    return 0
