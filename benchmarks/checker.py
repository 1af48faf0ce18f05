"""A client that believes nothing: sends distinct held-out rows at a low rate and compares every answer, bit for bit.

    python benchmarks/checker.py ADDRESS MODEL ROWS RATE      until its standard input closes

The expected answers are ONNX Runtime's own for each row alone. It prints `checking` once it has begun and one JSON
object at its end: calls made, answers wrong (with the first one described), calls that failed, and when each ended.
"""

from __future__ import annotations

import json
import select
import sys
import time

import grpc
import numpy as np
import onnxruntime
from numpy.typing import NDArray

import harness
from bodies import answer, request


def expected(model: str, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """ONNX Runtime's answers [N, D_out], each row run alone."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = harness.newest(model) / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    alone = [session.run(None, {name: row[None]})[0] for row in rows]
    found: NDArray[np.float32] = np.concatenate(alone)
    return found


def main(address: str, model: str, rows_each: int, rate: float) -> None:
    rows = harness.held_out(model)
    right = expected(model, rows)
    calls = []
    for first in range(0, len(rows) - rows_each + 1, rows_each):
        chosen = slice(first, first + rows_each)
        calls.append((request(model, rows[chosen]), right[chosen].tobytes()))
    ended: list[float] = []
    wrong = failed = 0
    first_wrong = first_failure = ""
    with grpc.insecure_channel(address) as channel:
        infer = channel.unary_unary(harness.METHOD)
        infer(calls[0][0], timeout=10, wait_for_ready=True)
        # From here on everything counts: the caller has taken the server's counters after this line.
        print("checking", flush=True)
        sys.stdin.readline()
        due = time.monotonic()
        for i in range(sys.maxsize):
            due += 1.0 / rate
            if select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
                break
            message, want = calls[i % len(calls)]
            try:
                got = answer(infer(message, timeout=10))
            except grpc.RpcError as error:
                failed += 1
                first_failure = first_failure or f"call {i}: {error.code().name}: {error.details()}"
                continue
            ended.append(time.time())
            if got.tobytes() != want:
                wrong += 1
                first_wrong = first_wrong or f"call {i}: {got.tolist()}"
    report = {
        "checked": len(ended),
        "wrong": wrong,
        "failed": failed,
        "first_wrong": first_wrong,
        "first_failure": first_failure,
        "ended": ended,
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
