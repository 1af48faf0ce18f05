"""Runs cases of bench_gpu.py on a CUDA device, in a process apart: whatever a case does to it, others are spared.

    python benchmarks/gpu_worker.py FOLDER SECONDS WINDOWS MIXED < cases     a key a line, as Case.key has it

Prints a JSON object a line: first what the device is, then for each case its seconds a batch, or why there are none. An
answer that is not the network's is no figure. Networks are written to FOLDER; MIXED is how many batches the way `mixed`
runs.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import torch  # isort: skip  # first: CUDA's libraries come with it, and ONNX Runtime finds those that are loaded
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

import gpu_memory
import mlp_file
import timing
from gpu_cases import COPY, ITEMSIZE, MIXED, NETWORKS, ROOF, Case

ON, DEVICE = "cuda", 0
PROVIDER = "CUDAExecutionProvider"
CHECKED_ROWS = 64  # of a batch, against float64
# What an answer may be off, in parts of the largest: a sum of thousands of products, each rounded to 2^-24 or 2^-11.
ALLOWED = {"fp32": 1e-4, "tf32": 2**-7, "fp16": 2**-7}
COPIED = 1 << 30  # bytes, to measure the memory's bandwidth with
SIDE = 8192  # of the matrices, to measure the matrix rate with

MIXED_ROWS = 4096  # different ones
CPU = (1e-4, 1e-5)  # rtol and atol against the CPU provider: what a contract in float32 allows

Run = Callable[[], object]
Array = NDArray[Any]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Ready:
    """A way to run one batch: `run` returns when it is done, `answer` gives what came of the last one."""

    run: Run
    answer: Callable[[], Array]
    within: Callable[[Callable[[], list[float]]], list[float]] | None = None  # measures on another thread
    more: Callable[[], dict[str, float]] | None = None  # further figures, once it was measured


class Bench:
    """The networks of one process, made as they are asked for."""

    def __init__(self, folder: Path, windows: timing.Windows, mixed: int) -> None:
        self._folder = folder
        self._windows = windows
        self._mixed_batches = mixed

    def measure(self, case: Case) -> dict[str, Any]:
        """The figures of a case: `seconds` a batch, one for each window. Raises whatever goes wrong."""
        if case.network == ROOF:
            return self._roof(case)
        if case.way == MIXED:
            return self._mixed(case)
        ready = WAYS[case.way](self, case)
        ready.run()
        # `matmul` leaves out biases and ReLU, so its answers are others.
        difference = 0.0 if case.way == "matmul.device" else self._check(case, ready.answer())
        seconds = (ready.within or _directly)(lambda: timing.per_run(ready.run, self._windows))
        return {"seconds": seconds, "difference": difference, **(ready.more() if ready.more else {})}

    def _roof(self, case: Case) -> dict[str, Any]:
        """Bytes or FLOPs a second."""
        if case.way == COPY:
            source = torch.empty(COPIED, dtype=torch.uint8, device=ON)
            target = torch.empty_like(source)
            work = 2.0 * COPIED  # read once, written once
            run: Run = functools.partial(target.copy_, source)
        else:
            _precision(case.precision)
            a, b = (torch.randn(SIDE, SIDE, device=ON, dtype=_dtype(case.precision)) for _ in range(2))
            out = torch.empty_like(a)
            work = 2.0 * SIDE**3
            run = functools.partial(torch.matmul, a, b, out=out)

        def waited() -> None:
            run()
            torch.cuda.synchronize()

        seconds = timing.per_run(waited, self._windows)
        return {"seconds": seconds, "per_second": work / statistics.median(seconds)}

    def _mixed(self, case: Case) -> dict[str, Any]:
        """Batches of 1 to `case.batch` rows through one session, their answers held against the CPU provider's."""
        x = _inputs(case.network, MIXED_ROWS)
        cpu = ort.InferenceSession(str(self.path(case)), providers=["CPUExecutionProvider"])
        (expected,) = cpu.run(None, {"x": x})
        session = _session(self, case, x)

        def run(rows: Array) -> Array:
            room = session.room(len(rows))
            np.copyto(room[0], rows)
            return np.asarray(session.run(room, (0,))[0])

        def used() -> int:
            free, total = torch.cuda.mem_get_info(DEVICE)
            return int(total - free)

        found = _on_its_thread(
            session, lambda: gpu_memory.mixed(run, x, expected, case.batch, self._mixed_batches, used, *CPU)
        )
        return {**dataclasses.asdict(found), "rtol": CPU[0], "atol": CPU[1], "replays": session.graph_replays}

    def _check(self, case: Case, answer: Array) -> float:
        """The largest difference from float64, in parts of the largest answer. Raises ValueError if it is too large."""
        expected = _expected(case.network, case.batch)
        difference = float(np.abs(answer[: len(expected)] - expected).max() / np.abs(expected).max())
        allowed = ALLOWED[case.precision]
        if not difference <= allowed:
            raise ValueError(f"its answers are off by {difference:.2g} of the largest; expected at most {allowed:.2g}")
        return difference

    def path(self, case: Case) -> Path:
        """The case's network as a file."""
        half = case.precision == "fp16"
        path = self._folder / f"{case.network}{'-half' if half else ''}.onnx"
        if not path.exists():
            mlp_file.write(path, _layers(case.network), half)
        return path


def _directly(measure: Callable[[], list[float]]) -> list[float]:
    return measure()


# -- what all ways of a case share ------------------------------------------------------------------------------------


@functools.lru_cache(1)
def _layers(network: str) -> list[mlp_file.Layer]:
    return mlp_file.layers(NETWORKS[network])


@functools.lru_cache(1)
def _inputs(network: str, batch: int) -> Array:
    return np.random.default_rng(batch).standard_normal((batch, NETWORKS[network][0]), np.float32)


@functools.lru_cache(1)
def _expected(network: str, batch: int) -> Array:
    a: Array = _inputs(network, batch)[:CHECKED_ROWS].astype(np.float64)
    layers = _layers(network)
    for i, (w, b) in enumerate(layers):
        a = a @ w.T.astype(np.float64) + b
        if i < len(layers) - 1:
            a = np.maximum(a, 0)
    return a


def _dtype(precision: str) -> torch.dtype:
    return torch.float16 if precision == "fp16" else torch.float32


def _precision(precision: str) -> None:
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


# -- ONNX Runtime -----------------------------------------------------------------------------------------------------


def _open(bench: Bench, case: Case, graph: bool = False) -> Any:
    options = {"device_id": DEVICE, "use_tf32": int(case.precision == "tf32"), "enable_cuda_graph": int(graph)}
    session = ort.InferenceSession(str(bench.path(case)), providers=[(PROVIDER, options)])
    if session.get_providers()[0] != PROVIDER:
        raise RuntimeError(f"ONNX Runtime offers {session.get_providers()[0]} in place of its CUDA provider")
    return session


def _plain(bench: Bench, case: Case) -> Ready:
    session, x = _open(bench, case), _inputs(case.network, case.batch)
    last: list[Array] = []

    def run() -> None:
        last[:] = session.run(None, {"x": x})

    return Ready(run, lambda: last[0])


def _bound(bench: Bench, case: Case, host: bool, graph: bool) -> Ready:
    session, x = _open(bench, case, graph), _inputs(case.network, case.batch)
    inputs = ort.OrtValue.ortvalue_from_numpy(x, ON, DEVICE)
    shape = (case.batch, NETWORKS[case.network][-1])
    outputs = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, ON, DEVICE)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", inputs)
    binding.bind_ortvalue_output("y", outputs)
    last: list[Array] = []

    def run() -> None:
        inputs.update_inplace(x)
        session.run_with_iobinding(binding)
        last[:] = [outputs.numpy()]

    def on_device() -> None:
        session.run_with_iobinding(binding)  # returns when the device is done

    if host:
        return Ready(run, lambda: last[0])
    return Ready(on_device, outputs.numpy)


# -- Forwardpass ------------------------------------------------------------------------------------------------------


def _session(bench: Bench, case: Case, samples: Array) -> Any:
    """The server's own session, with a graph for every size up to the case's."""
    from forwardpass.execution.cuda.session import CudaSession  # may not be there; then these cases alone fail
    from forwardpass.execution.providers import place

    where = dataclasses.replace(place(f"cuda:{DEVICE}", 1, ""), allow_tf32=case.precision == "tf32")
    session = CudaSession(bench.path(case), where)
    session.prepare(case.batch, True, [samples], case.precision != "fp32")
    if case.batch not in session.graph_sizes:
        raise RuntimeError(f"no CUDA graph: {session.how}")
    return session


def _on_its_thread(session: Any, job: Callable[[], T]) -> T:
    """What `job` gives on the session's own thread, where a server runs its batches. Raises what it raises."""
    found: list[T] = []
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            found.append(job())
        except BaseException as error:
            failed.append(error)

    long_task = session.long_task(guarded)
    long_task.start()
    long_task.join()
    if failed:
        raise failed[0]
    return found[0]


def _forwardpass(bench: Bench, case: Case) -> Ready:
    """As a server does it: stack into the session's buffers, copy in, replay, copy out."""
    x = _inputs(case.network, case.batch)
    session = _session(bench, case, x)
    notes: list[Any] = []
    session.ran = notes.append
    last: list[Array] = []

    def run() -> None:
        room = session.room(case.batch)
        if room is None:  # not on its thread
            last[:] = session.run([x], (0,))
            return
        np.copyto(room[0], x)
        last[:] = session.run(room, (0,))

    def more() -> dict[str, float]:
        timed = [note for note in notes if note.run is not None]
        stages = {stage: [getattr(note, stage) for note in timed] for stage in ("copy_in", "run", "copy_out")}
        return {f"device_{stage}": statistics.median(seconds) for stage, seconds in stages.items() if seconds}

    return Ready(run, lambda: last[0], functools.partial(_on_its_thread, session), more)


# -- PyTorch ----------------------------------------------------------------------------------------------------------


def _module(case: Case) -> torch.nn.Module:
    _precision(case.precision)
    parts: list[torch.nn.Module] = []
    for w, b in _layers(case.network):
        linear = torch.nn.Linear(w.shape[1], w.shape[0], device=ON, dtype=_dtype(case.precision))
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(w))
            linear.bias.copy_(torch.from_numpy(b))
        parts += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*parts[:-1]).eval()


def _torch(_: Bench, case: Case, host: bool, graph: bool) -> Ready:
    module, dtype = _module(case), _dtype(case.precision)
    pinned = torch.from_numpy(_inputs(case.network, case.batch)).pin_memory()
    x = pinned.to(ON)
    answer = torch.empty(case.batch, NETWORKS[case.network][-1], pin_memory=True)

    @torch.inference_mode()
    def forward() -> torch.Tensor:
        y: torch.Tensor = module(x.to(dtype)).float()
        return y

    y = forward()
    step: Callable[[], torch.Tensor] = forward
    if graph:
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _warm_up in range(3):
                forward()
        torch.cuda.current_stream().wait_stream(aside)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            y = forward()

        def step() -> torch.Tensor:
            captured.replay()
            return y

    def run() -> None:
        x.copy_(pinned, non_blocking=True)
        with torch.inference_mode():
            answer.copy_(step(), non_blocking=True)
        torch.cuda.synchronize()

    def on_device() -> None:
        answers[:] = [step()]
        torch.cuda.synchronize()

    answers = [y]
    if host:
        return Ready(run, answer.numpy)
    return Ready(on_device, lambda: answers[0].cpu().numpy())


def _products(_: Bench, case: Case) -> Ready:
    """The same products as a chain of torch.matmul, and nothing else."""
    _precision(case.precision)
    dtype = _dtype(case.precision)
    weights = [torch.from_numpy(w).to(ON, dtype).t() for w, _ in _layers(case.network)]
    x = torch.from_numpy(_inputs(case.network, case.batch)).to(ON, dtype)

    @torch.inference_mode()
    def run() -> None:
        a = x
        for w in weights:
            a = torch.matmul(a, w)
        torch.cuda.synchronize()

    return Ready(run, lambda: x.float().cpu().numpy())


WAYS: dict[str, Callable[[Bench, Case], Ready]] = {
    "ort": _plain,
    "ort-bound": functools.partial(_bound, host=True, graph=False),
    "forwardpass": _forwardpass,
    "torch": functools.partial(_torch, host=True, graph=False),
    "torch-graph": functools.partial(_torch, host=True, graph=True),
    "ort-bound.device": functools.partial(_bound, host=False, graph=False),
    "ort-graph.device": functools.partial(_bound, host=False, graph=True),
    "torch.device": functools.partial(_torch, host=False, graph=False),
    "torch-graph.device": functools.partial(_torch, host=False, graph=True),
    "matmul.device": _products,
}


def device() -> dict[str, Any]:
    """What the figures are measured on."""
    its = torch.cuda.get_device_properties(DEVICE)
    driver = Path("/proc/driver/nvidia/version")
    return {
        "name": its.name,
        "memory": its.total_memory,
        "multiprocessors": its.multi_processor_count,
        "driver": driver.read_text().split("  ")[1].strip() if driver.exists() else "unknown",
        "python": platform.python_version(),
        "packages": {"torch": torch.__version__, "onnxruntime": ort.__version__, "numpy": np.__version__},
    }


def main() -> int:
    folder, seconds, windows, mixed = sys.argv[1:]
    bench = Bench(Path(folder), timing.Windows(float(seconds), int(windows)), int(mixed))
    print(json.dumps({"device": device()}), flush=True)
    for line in sys.stdin:
        case = Case.of(line.strip())
        try:
            found = bench.measure(case)
        except Exception as error:
            words = " ".join(str(error).split())[:300]
            found = {"failed": f"{type(error).__name__}: {words}"}
        print(json.dumps({"case": case.key, **found}), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return 0


assert set(ITEMSIZE) == set(ALLOWED)

if __name__ == "__main__":
    sys.exit(main())
