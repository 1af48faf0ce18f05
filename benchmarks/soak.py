"""A steady load for minutes: does memory grow, do threads or descriptors leak, does the latency hold?

    python benchmarks/soak.py [--minutes 10] [--load 0.7]

First the most the server can do in a closed loop (4x16, digits, one row), then `load` of that at a constant rate, each
connection on its own clock (h2load --rps), while the checking client compares answers. h2load lets a rate out in bursts
every 10 ms, so the latencies are those of a load that is bursty as well as steady: they are there to be compared with
each other over the minutes. It writes one log line a request into a pipe that is read as it goes, so that ten minutes
need no gigabytes. A request that finds all 256 streams of its connection taken waits in h2load and is not timed
meanwhile; that takes a stall of some 50 ms, which the maximum of its window shows.

Verdict: resident memory after the first minute grows by less than 5 %, no more threads or descriptors than then, the
worst window's p99 at most twice the median window's, every answer OK and right. Exit status: 0, 1, or 2 when it cannot
be run here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import h2load
import harness
from bodies import framed, request
from h2load import Load
from harness import BenchmarkError, Server

WINDOW = 10.0  # seconds
SETTLED = 60.0  # seconds after which nothing may grow any more
CONNECTIONS, STREAMS = 4, 256
CHECKS_PER_SECOND = 100.0  # of the checking client: a few per cent of the load core
GROWTH, WORST = 1.05, 2.0


class LogPipe:
    """h2load's log as a named pipe, read by a thread of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._lock = threading.Lock()
        self._parts: list[h2load.Log] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        rest = b""
        with self.path.open("rb", buffering=0) as pipe:
            while chunk := pipe.read(1 << 16):
                whole, newline, rest = (rest + chunk).rpartition(b"\n")
                part = h2load.parse_log(whole + newline)
                with self._lock:
                    self._parts.append(part)

    def take(self) -> tuple[NDArray[np.float64], int]:
        """Seconds that each request took since the last call, and how many failed."""
        with self._lock:
            parts, self._parts = self._parts, []
        if not parts:
            return np.zeros(0), 0
        return np.concatenate([p.took for p in parts]), int(sum((~p.ok).sum() for p in parts))

    def join(self) -> None:
        self._thread.join(10.0)


class Checker:
    """checker.py in a process of its own, on the load core."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def finish(self) -> dict[str, Any]:
        said, _ = self._process.communicate(timeout=30)
        report: dict[str, Any] = json.loads(said)
        return report


@contextlib.contextmanager
def checking(server: Server) -> Iterator[Checker]:
    command = [sys.executable, str(harness.HERE / "checker.py"), server.address, "digits", "1", str(CHECKS_PER_SECOND)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "checking":
            raise BenchmarkError("the checking client did not start; its output is above")
        yield Checker(process)
    finally:
        harness.end(process, 5.0)


def capacity(server: Server, body: Path, seconds: float = 5.0) -> float:
    """Requests per second of a closed loop, after a second of warm-up."""
    log = body.with_name("capacity")
    began = time.time()
    h2load.finish(h2load.start(h2load.command(server.address, body, Load(4, 16), seconds, log)), 60.0)
    return len(h2load.read_log(log).between(began + 1.0, began + seconds).took) / (seconds - 1.0)


def soak(server: Server, folder: Path, load: float, seconds: float) -> dict[str, Any]:
    """Windows of figures, and what was wrong with the answers."""
    body = folder / "body"
    body.write_bytes(framed(request("digits", harness.held_out("digits")[:1])))
    most = capacity(server, body)
    rate = Load(CONNECTIONS, STREAMS, most * load / CONNECTIONS)
    print(f"at most {most:,.0f} requests/s; {seconds:g} s at {most * load:,.0f}", file=sys.stderr, flush=True)
    windows: list[dict[str, Any]] = []
    with checking(server) as checker:
        before = _ok(server)
        checker.go()
        pipe = LogPipe(folder / "log")
        process = h2load.start(h2load.command(server.address, body, rate, seconds, pipe.path))
        began = time.monotonic()
        cpu = server.cpu_seconds()
        for i in range(1, int(seconds / WINDOW) + 1):
            time.sleep(max(0.0, began + i * WINDOW - time.monotonic()))
            took, failed = pipe.take()
            cpu, spent = server.cpu_seconds(), server.cpu_seconds() - cpu
            windows.append(_window(server, i * WINDOW, took, failed, spent))
        summary = h2load.finish(process, 60.0)
        pipe.join()
        checks = checker.finish()
    answered = _ok(server) - before
    return {
        "most_per_second": most,
        "offered_per_second": most * load,
        "windows": windows,
        "answers": summary.succeeded,
        "failed": summary.failed,
        "not_ok": summary.succeeded + checks["checked"] - answered,
        "checked": checks["checked"],
        "wrong": checks["wrong"] + checks["failed"],
    }


def _window(server: Server, at: float, took: NDArray[np.float64], failed: int, spent: float) -> dict[str, Any]:
    if not len(took):
        raise BenchmarkError(f"nothing was answered in the {WINDOW:g} s before second {at:g}")
    footprint = harness.footprint(server.pid)
    p50, p99, worst = np.percentile(took, (50, 99, 100)) * 1e3
    window = {
        "at": at,
        "requests": len(took),
        "failed": failed,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "max_ms": float(worst),
        "cpu_share": spent / WINDOW,
        "rss": footprint.rss,
        "threads": footprint.threads,
        "descriptors": footprint.descriptors,
    }
    print(
        f"{at:>5.0f} s {len(took) / WINDOW:>8,.0f}/s  p50 {p50:.2f} ms  p99 {p99:.2f} ms  max {worst:.1f} ms  "
        f"RSS {footprint.rss / 1e6:.1f} MB  {footprint.threads} threads  {footprint.descriptors} descriptors",
        flush=True,
    )
    return window


def _ok(server: Server) -> float:
    return server.scrape().total("forwardpass_requests_total", code="OK")


def verdicts(found: dict[str, Any]) -> list[tuple[str, bool]]:
    """What is asked, and whether it holds."""
    windows = found["windows"]
    settled = [w for w in windows if w["at"] >= min(SETTLED, windows[-1]["at"] / 2)]
    first, last = settled[0], settled[-1]
    most_rss = max(w["rss"] for w in settled) / first["rss"]
    worst = max(w["p99_ms"] for w in settled) / statistics.median(w["p99_ms"] for w in settled)
    most_threads, fewer = max(w["threads"] for w in settled), last["descriptors"] <= first["descriptors"]
    # What was in flight when h2load's time was up was answered too, but nobody was there to see it.
    not_ok, failed = max(0, found["not_ok"]), found["failed"]
    after = f"after second {first['at']:g}"
    return [
        (f"{after}, memory grows by {most_rss - 1:.1%} at most (under {GROWTH - 1:.0%})", most_rss < GROWTH),
        (f"{after}, {most_threads} threads at most ({first['threads']} then)", most_threads <= first["threads"]),
        # A scrape may be under way when it is looked, so what counts is the end.
        (f"{after}, {last['descriptors']} descriptors at last ({first['descriptors']} then)", fewer),
        (f"the worst window's p99 is {worst:.2f} times the median window's (at most {WORST:g})", worst <= WORST),
        (f"{found['wrong']} of {found['checked']:,} checked answers were wrong (none)", not found["wrong"]),
        (
            f"of {found['answers']:,} answers, {not_ok:.0f} were not OK and {failed} failed (none)",
            not (not_ok or failed),
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A steady load for minutes.")
    parser.add_argument("--minutes", type=float, default=10.0, help="(default: %(default)s)")
    parser.add_argument("--load", type=float, default=0.7, help="of what a closed loop gets (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="record the result in benchmarks/results")
    args = parser.parse_args(argv)
    try:
        h2load.require()
        cores = harness.pin()
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            folder = Path(name)
            harness.repository(folder / "models", ["digits"])
            with harness.serve(folder / "models", cores.server) as server:
                found = soak(server, folder, args.load, args.minutes * 60)
    except BenchmarkError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    return harness.conclude("soak", cores, found, verdicts(found), args.keep)


if __name__ == "__main__":
    sys.exit(main())
