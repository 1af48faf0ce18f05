"""h2load (nghttp2's load generator, C) as an object: what it is told, what it says, what its log holds.

It sends one and the same body every time and sees HTTP statuses, not gRPC's: whoever uses it has to look elsewhere for
what was answered (bench.py: the server's own counters, the bytes that came back, and checker.py).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness import METHOD, BenchmarkError


@dataclass(frozen=True, slots=True)
class Load:
    """How hard: closed loop, `connections` x `streams` requests in flight; `rate` requests/s each connection, or 0."""

    connections: int
    streams: int
    rate: float = 0.0

    @property
    def in_flight(self) -> int:
        return self.connections * self.streams

    def __str__(self) -> str:
        return f"{self.connections}x{self.streams}"


@dataclass(frozen=True, slots=True)
class Summary:
    """What h2load says at its end, about the whole of its run."""

    succeeded: int  # HTTP status 2xx
    failed: int  # failed, errored or timed out
    data_bytes: int  # of response bodies


@dataclass(frozen=True, slots=True)
class Log:
    """One entry a request, in the order of their ends."""

    ended: NDArray[np.float64]  # seconds since the epoch
    took: NDArray[np.float64]  # seconds
    ok: NDArray[np.bool_]  # HTTP status 200

    def between(self, begin: float, end: float) -> Log:
        """Those that ended in [begin, end)."""
        inside = (self.ended >= begin) & (self.ended < end)
        return Log(self.ended[inside], self.took[inside], self.ok[inside])


def require() -> None:
    """Raises BenchmarkError, with what to install, where there is no h2load."""
    if shutil.which("h2load") is None:
        raise BenchmarkError(
            "h2load is not installed. On Debian and Ubuntu: apt-get install nghttp2-client; on Fedora: dnf install "
            "nghttp2; on Alpine: apk add nghttp2"
        )


def command(address: str, body: Path, load: Load, seconds: float, log: Path | None, *headers: str) -> list[str]:
    found = ["h2load", "-t1", f"-c{load.connections}", f"-m{load.streams}", f"-D{seconds * 1000:.0f}ms", f"-d{body}"]
    for header in ("content-type: application/grpc", "te: trailers", *headers):
        found += ["-H", header]
    if load.rate:
        found.append(f"--rps={load.rate:g}")
    if log is not None:
        found.append(f"--log-file={log}")
    return [*found, f"http://{address}{METHOD}"]


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], seconds: float) -> Summary:
    """Wait for it and read what it said. Raises BenchmarkError if it fails or takes more than `seconds`."""
    began = time.monotonic()
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        raise BenchmarkError(f"h2load was still running after {time.monotonic() - began:.0f} s:\n{said}") from None
    if process.returncode:
        raise BenchmarkError(f"h2load ended with {process.returncode}:\n{said}")
    return parse(said)


def parse(said: str) -> Summary:
    """h2load's own summary. Raises BenchmarkError where it is not one."""
    requests = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", said)
    statuses = re.search(r"status codes: (\d+) 2xx", said)
    data = re.search(r"\((\d+)\) data", said)
    if requests is None or statuses is None or data is None:
        raise BenchmarkError(f"h2load did not end with a summary:\n{said}")
    # "failed" counts the errored and the timed-out ones too.
    return Summary(int(statuses[1]), int(requests[2]), int(data[1]))


def read_log(path: Path) -> Log:
    """A whole log file; an unfinished last line is left out."""
    text = path.read_bytes()
    return parse_log(text[: text.rfind(b"\n") + 1])


def parse_log(text: bytes) -> Log:
    """Lines of: start in microseconds since the epoch, HTTP status (-1: the stream failed), microseconds taken."""
    table = np.array(text.split(), np.float64).reshape(-1, 3)
    took = table[:, 2] * 1e-6
    return Log(table[:, 0] * 1e-6 + took, took, table[:, 1] == 200)
