"""What clients with single rows notice of clients with thousands of rows, of the same model; and these of those.

    python benchmarks/bulk.py [--seconds 4] [--rounds 3] [--keep]

A real server on one core; on the other the clients, each a process of its own that calls as fast as it is answered:
the victim with a row at a time, beside nobody (calm), one client of 65,000 rows a request, and four of 8,192. The bulk
clients are measured alone as well. All of them take turns within a round. Victims compare every answer, bit for bit,
with what ONNX Runtime says of the row alone; bulk clients hold theirs against its answers to
all of their rows, but for rounding.

Verdict: no call of the victim's failed and no answer was wrong; beside the others its p99 is at most five times what
it is calm, or one batch and 10 ms; they keep 70 % of the rows a second that they have alone. Exit status: 0 when that
holds; 1 otherwise; 2 when it cannot be run here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
from numpy.typing import NDArray

import harness
import networks
from bodies import request
from forwardpass import protocol
from harness import BenchmarkError, Server

NAME = "bulk"
WIDTH, LAYERS = 256, 2  # of the network: digits'
CASES = {"1 of 65,000 rows": (1, 65_000), "4 of 8,192 rows": (4, 8_192)}
WARM_UP = 0.5  # seconds of each measurement that are not counted
BATCH_AND = 0.010  # seconds
TIMES_CALM, KEPT = 5.0, 0.70

Figures = dict[str, Any]


def caller(address: str, model: Path, rows: int, seconds: float) -> Figures:
    """Call with `rows` rows as fast as answers come. What one client process does and prints."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(rows).normal(0, 1, (rows, networks.WIDTH_IN)).astype(np.float32)
    right = session.run(None, {"x": x})[0]
    message = request(NAME, x)
    if rows > 1:
        os.nice(10)  # clients share a core here, and would not elsewhere: the victim's time must be the server's
    took, failed, wrong = list[float](), dict[str, int](), 0
    known = b""  # an answer that was held against ONNX Runtime's
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(address, options=options) as channel:
        call = channel.unary_unary(harness.METHOD)
        begin = time.monotonic() + WARM_UP
        ended = 0.0
        while ended < begin + seconds:
            began = time.monotonic()
            try:
                answer = call(message, timeout=20.0)
            except grpc.RpcError as error:
                reason = f"{error.code().name}: {error.details()}"[:90]
                failed[reason] = failed.get(reason, 0) + 1
                time.sleep(0.005)
                ended = time.monotonic()
                continue
            ended = time.monotonic()
            if not known and _right(answer, right):
                known = answer
            wrong += answer != known
            if began >= begin:
                took.append(ended - began)
    return {"took": took, "failed": failed, "wrong": wrong, "rows_per_second": rows * len(took) / seconds}


def _right(answer: bytes, right: NDArray[np.float32]) -> bool:
    """Whether a response has these rows: to the bit if it is one, else but for rounding."""
    response = protocol.ModelInferResponse.FromString(answer)
    y = np.frombuffer(response.raw_output_contents[0], np.float32).reshape(right.shape)
    return np.array_equal(y, right) if len(right) == 1 else np.allclose(y, right, rtol=1e-4, atol=1e-5)


def measure(
    server: Server, model: Path, clients: dict[str, tuple[int, int]], seconds: float
) -> dict[str, list[Figures]]:
    """Run clients side by side: by name, how many and with how many rows a request. What each found."""
    running = {
        name: [_start(server, model, rows, seconds) for _ in range(count)] for name, (count, rows) in clients.items()
    }
    try:
        return {name: [_figures(process) for process in processes] for name, processes in running.items()}
    finally:
        for processes in running.values():
            for process in processes:
                harness.end(process)


def _start(server: Server, model: Path, rows: int, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--caller", server.address, str(model), str(rows), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _figures(process: subprocess.Popen[str]) -> Figures:
    said, _ = process.communicate(timeout=120.0)
    if process.returncode:
        raise BenchmarkError(f"a client ended with status {process.returncode}")
    found: Figures = json.loads(said)
    return found


def a_round(server: Server, model: Path, seconds: float) -> dict[str, Figures]:
    """The victim calm, then every case alone and beside it."""
    victim = {"victim": (1, 1)}
    found = {"calm": _victim(measure(server, model, victim, seconds)["victim"][0])}
    for case, clients in CASES.items():
        alone = measure(server, model, {"bulk": clients}, seconds)["bulk"]
        beside = measure(server, model, {"bulk": clients, **victim}, seconds)
        found[case] = _victim(beside["victim"][0]) | {
            "alone": sum(f["rows_per_second"] for f in alone),
            "beside": sum(f["rows_per_second"] for f in beside["bulk"]),
            "bulk_failed": [f["failed"] for f in (*alone, *beside["bulk"]) if f["failed"]],
            "bulk_wrong": sum(f["wrong"] for f in (*alone, *beside["bulk"])),
        }
    return found


def _victim(figures: Figures) -> Figures:
    took = figures["took"] or [float("inf")]
    p50, p99 = map(float, np.quantile(took, (0.5, 0.99)))
    failed = sum(figures["failed"].values())
    return {
        "p50": p50,
        "p99": p99,
        "calls": len(figures["took"]),
        "failed": failed,
        "reasons": figures["failed"],
        "wrong": figures["wrong"],
    }


def show(case: str, figures: Figures) -> None:
    bulk = f"   bulk {figures['alone']:9,.0f} -> {figures['beside']:9,.0f} rows/s" if "alone" in figures else ""
    print(
        f"  {case:16}  p50 {figures['p50'] * 1e3:7.2f} ms   p99 {figures['p99'] * 1e3:7.2f} ms   "
        f"{figures['calls']:6} calls, {figures['failed']} failed, {figures['wrong']} wrong{bulk}",
        flush=True,
    )
    for who, reasons in (("victim", [figures["reasons"]]), ("bulk", figures.get("bulk_failed", []))):
        for reason, times in [item for found in reasons for item in found.items()]:
            print(f"      {who}: {times} x {reason}")


def verdicts(rounds: list[dict[str, Figures]], batch: float) -> list[tuple[str, bool]]:
    """What is asked, and whether it holds, by the medians of the rounds. `batch`: seconds of a full one."""
    every = [figures for found in rounds for figures in found.values()]
    failed, wrong = (sum(f[what] for f in every) for what in ("failed", "wrong"))
    wrong += sum(f.get("bulk_wrong", 0) for f in every)
    found = [
        (f"victim's calls that failed: {failed} (none)", failed == 0),
        (f"wrong answers: {wrong} (none)", wrong == 0),
    ]
    calm = statistics.median(r["calm"]["p99"] for r in rounds)
    allowed = max(TIMES_CALM * calm, batch + BATCH_AND)
    for case in CASES:
        p99 = statistics.median(r[case]["p99"] for r in rounds)
        text = f"beside {case}: p99 {p99 * 1e3:.2f} ms (calm {calm * 1e3:.2f}; at most {allowed * 1e3:.2f})"
        found.append((text, bool(p99 <= allowed)))
        kept = statistics.median(r[case]["beside"] / r[case]["alone"] if r[case]["alone"] else 0.0 for r in rounds)
        found.append((f"{case}: {kept:.0%} of the rows a second alone (at least {KEPT:.0%})", kept >= KEPT))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--options", default="", help="lines of the model's model.toml")
    parser.add_argument("--keep", action="store_true", help="write the figures where the document takes them from")
    parser.add_argument("--caller", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.caller:
        address, model, rows, seconds = args.caller
        print(json.dumps(caller(address, Path(model), int(rows), float(seconds))))
        return 0
    try:
        cores = harness.pin()
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            folder = networks.repository(Path(name), NAME, WIDTH, LAYERS, args.options)
            model = folder / NAME / "1" / "model.onnx"
            rounds = []
            with harness.serve(folder, cores.server) as server:
                for number in range(args.rounds):
                    print(f"round {number + 1}")
                    rounds.append(a_round(server, model, args.seconds))
                    for case, figures in rounds[-1].items():
                        show(case, figures)
                batch = _batch_seconds(server)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return harness.conclude("bulk", cores, {"rounds": rounds, "batch": batch}, verdicts(rounds, batch), args.keep)


def _batch_seconds(server: Server) -> float:
    """Of a full batch, as the server has fitted it."""
    found = server.scrape()
    a, b = (found.total("forwardpass_run_seconds_fitted", term=term) for term in "ab")
    return a + b * 64


if __name__ == "__main__":
    raise SystemExit(main())
