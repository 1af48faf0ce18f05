"""The limits of a provider: floating-point operations a second in a matrix product, bytes a second in a copy.

Both are measured in ONNX Runtime itself, on the provider and with the threads that run the network, with tensors on its
device, so that only arithmetic and memory limit them. The copy is a negation, which reads and writes every element; the
runtime would elide a plain copy.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.execution.onnx_runtime import ort
from forwardpass.execution.placement import Placement
from forwardpass.optional_imports import need

_SIDES = (128, 256, 512, 1024)  # of square matrices; which product is fastest depends on the caches
_COPIES = (1 << 17, 1 << 20, 1 << 23, 1 << 27)  # bytes read; as many are written
_SECONDS = 0.06  # per measurement


@dataclass(frozen=True, slots=True)
class Roofs:
    """The limits of one provider."""

    flops: float  # operations a second
    bandwidths: tuple[tuple[int, float], ...]  # (bytes touched, bytes a second), by size: caches are faster

    def bandwidth(self, nbytes: float) -> float:
        """Bytes a second for work that touches `nbytes`: of the smallest copy at least as large, else the largest."""
        return next((speed for size, speed in self.bandwidths if size >= nbytes), self.bandwidths[-1][1])

    def compute_seconds(self, flops: float) -> float:
        """The minimum time for `flops` operations."""
        return flops / self.flops

    def memory_seconds(self, nbytes: float) -> float:
        """The minimum time to move `nbytes` bytes."""
        return nbytes / self.bandwidth(nbytes)


def measure(placement: Placement) -> Roofs:
    """Measure the limits, in about a second. ONNX Runtime's exceptions propagate if the provider cannot be used."""
    rng = np.random.default_rng(0)
    flops = 0.0
    for side in _SIDES:
        square = rng.standard_normal((side, side), dtype=np.float32)
        flops = max(flops, 2 * side**3 / _fastest(_bound("MatMul", [square, square.copy()], placement)))
    # The overhead of a call with negligible work.
    call = _fastest(_bound("Neg", [np.zeros(1, np.float32)], placement))
    bandwidths = []
    for size in _COPIES:
        seconds = _fastest(_bound("Neg", [np.ones(size // 4, np.float32)], placement))
        bandwidths.append((2 * size, 2 * size / max(seconds - call, 1e-9)))
    return Roofs(flops, tuple(bandwidths))


def _bound(op: str, arrays: Sequence[NDArray[np.float32]], placement: Placement) -> Any:
    """A function that runs one operator on tensors already on the device, and leaves the output there."""
    onnx = need("onnx", "insight")
    kind = onnx.TensorProto.FLOAT
    names = [f"x{place}" for place in range(len(arrays))]
    inputs = [onnx.helper.make_tensor_value_info(n, kind, list(a.shape)) for n, a in zip(names, arrays, strict=True)]
    output = onnx.helper.make_tensor_value_info("y", kind, None)
    graph = onnx.helper.make_graph([onnx.helper.make_node(op, names, ["y"])], "roof", inputs, [output])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = placement.threads
    options.log_severity_level = 3
    device = "cuda" if placement.devices else "cpu"
    settings = {"device_id": placement.device, "use_tf32": int(placement.allow_tf32)} if placement.devices else {}
    session = ort.InferenceSession(model.SerializeToString(), options, providers=[(placement.provider, settings)])
    binding = session.io_binding()
    for name, array in zip(names, arrays, strict=True):
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, device, placement.device))
    binding.bind_output("y", device, placement.device)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def _fastest(run: Any) -> float:
    run()
    fastest = float("inf")
    began = time.perf_counter()
    count = 0
    while count < 3 or time.perf_counter() - began < _SECONDS:
        start = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - start)
        count += 1
    return fastest
