"""One forward pass in a process of its own: its peak memory, the memory it still holds afterwards, and its time.

Method: a parent that has only imported PyTorch and ONNX Runtime forks a child for each point, so that no point is
affected by another's memory. The child sets the allocator (mallopt) to map every block above 64 kB separately and to
return freed memory to the system, so that it is no longer resident; runs the pass once, which loads the code; resets
the kernel's high-water mark of its resident set (writes 5 to /proc/self/clear_refs, Linux); runs the pass again; and
reads the mark (VmHWM) and the resident size (VmRSS) while the output is still held. Memory of every allocator counts;
the resolution is the pages around each tensor. Times are measured after that, with the allocator's thresholds at the
limits of glibc's own adaptation. One thread throughout.

    python -m forwardpass.insight.memory_probe      reads one JSON request per line from stdin, answers each on stdout
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from forwardpass.errors import ForwardpassError
from forwardpass.execution.ort_session import OrtSession
from forwardpass.execution.placement import CPU, Placement
from forwardpass.insight.ort_profile import example_rows
from forwardpass.insight.torch_forward import TorchForward, saved_bytes
from forwardpass.model.contract import CONTRACT_FILE, Contract
from forwardpass.model.onnx_graph import open_graph

MODES = ("autograd", "no_grad", "inference_mode", "session")
_STATUS = Path("/proc/self/status")
_TIMED_SECONDS = 0.1
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's numbers for these options of mallopt

Pass = Callable[[], Any]


def measure(path: Path, mode: str, rows: int) -> dict[str, float]:
    """Bytes above those before the pass: `peak`, `held` after it; median `seconds`; bytes `saved`, counted by PyTorch.

    Raises ForwardpassError if the network cannot be run. Call it in a process that does nothing else.
    """
    torch.set_num_threads(1)
    _allocator(1 << 16, 1 << 16)
    graph = open_graph(path, rows)
    contract = path.parent / CONTRACT_FILE
    feeds = example_rows(graph, Contract.load(contract) if contract.is_file() else None)
    saved = 0
    if mode == "session":
        _session_pass(path, feeds)()
        forward = _session_pass(path, feeds)  # a new session: the arena of the first has grown already
    else:
        network = TorchForward(graph)
        tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
        forward = _torch_pass(network, tensors, mode)
        forward()
        if mode == "autograd":
            saved = saved_bytes(network, tensors)
    gc.collect()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    answer = forward()
    peak = _resident("VmHWM") - before
    held = _resident("VmRSS") - before
    del answer
    _allocator(1 << 25, 1 << 26)  # the limits of glibc's own adaptation
    return {
        "peak": max(0, peak),
        "held": max(0, held),
        "seconds": _seconds(forward),
        "saved": saved,
    }


def _torch_pass(network: TorchForward, tensors: dict[str, torch.Tensor], mode: str) -> Pass:
    if mode == "autograd":
        return lambda: network(tensors)
    guard = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]

    def run() -> torch.Tensor:
        with guard():
            return network(tensors)

    return run


def _session_pass(path: Path, feeds: dict[str, NDArray[Any]]) -> Pass:
    """A pass in the server's own session, warmed up with one row."""
    session = OrtSession(path, Placement(CPU, 0, 1, "one thread"))
    arrays = [feeds[tensor.name] for tensor in session.signature.inputs]
    outputs = tuple(range(len(session.signature.outputs)))
    session.run([np.ascontiguousarray(array[:1]) for array in arrays], outputs)
    return lambda: session.run(arrays, outputs)


def _seconds(forward: Pass) -> float:
    """Median seconds of one pass, its output released each time."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < _TIMED_SECONDS:
        start = time.perf_counter()
        forward()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _allocator(mapped: int, kept: int) -> None:
    """Map blocks of at least `mapped` bytes separately, and keep up to `kept` free bytes resident. glibc only."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, mapped)
        library.mallopt(_TRIM_THRESHOLD, kept)


def _resident(field: str) -> int:
    """Bytes of this process's resident set: VmRSS current, VmHWM peak."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ForwardpassError(f"{_STATUS} has no {field}")


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return dict(measure(Path(request["path"]), request["mode"], request["rows"]))
    except ForwardpassError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": f"{request['rows']} rows do not fit in memory"}


def main() -> None:
    """Fork a child for every line of stdin; the child prints its answer and exits."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                print(json.dumps(_answer(json.loads(line))), flush=True)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"error": f"the pass was ended by signal {os.WTERMSIG(status)}"}), flush=True)


if __name__ == "__main__":
    main()
