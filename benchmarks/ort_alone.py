"""What ONNX Runtime alone takes for a batch: CPU time in microseconds, one thread, nothing around it.

    python benchmarks/ort_alone.py CORE MODEL.onnx INPUT_WIDTH BATCH...     prints a JSON object by batch size

Timed by process_time over many runs of fresh matrices, after a warm-up; the process is pinned to CORE.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime

SECONDS = 1.0  # of measuring for each batch size, or one round of its matrices where that takes longer
WARM_UP = 0.2


def microseconds(path: str, width: int, batch: int) -> float:
    """CPU time of one run over [batch, width], as the server's sessions are set."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    generator = np.random.default_rng(0)
    matrices = [generator.normal(8, 4, (batch, width)).astype(np.float32) for _ in range(16)]
    deadline = time.monotonic() + WARM_UP
    while time.monotonic() < deadline:
        for matrix in matrices[:4]:
            session.run(None, {name: matrix})
    runs, began, deadline = 0, time.process_time(), time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for matrix in matrices:
            session.run(None, {name: matrix})
        runs += len(matrices)
    return (time.process_time() - began) / runs * 1e6


if __name__ == "__main__":
    core, path, width, *batches = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    print(json.dumps({batch: microseconds(path, int(width), int(batch)) for batch in batches}))
