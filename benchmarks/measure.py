"""One measurement: a server, a load, a window in the middle of it, and proof that what came back were answers.

Requests are counted by the client: those whose answer was complete inside the window. CPU time is the server process's
own over the same window, so neither start-up nor warm-up is in it. Then the whole run is audited: as many OK as the
client saw, as many bytes as that many answers have, and no wrong answer among the checker's.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

import h2load
import harness
from bodies import framed, request
from h2load import Load
from harness import BenchmarkError, Server

CHECKS_PER_SECOND = 100.0  # of the checking client: a few per cent of the load core
CHECKS_BESIDE_ONE_STREAM = 20.0  # where each of them delays the one stream that is measured


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one measurement."""

    warm_up: float
    window: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is sent to which server, how hard. `checked`: the answers are a model's, and can be checked."""

    name: str
    server: str  # a key of bench.SERVERS
    load: Load
    model: str = "digits"
    rows: int = 1  # in a request
    checked: bool = True


def measure(server: Server, scenario: Scenario, server_core: int, times: Times) -> dict[str, Any]:
    """The raw figures of one measurement, as JSON has them. Times are in microseconds, rates per second.

    `problems` says what was wrong with the answers; empty is what it should be.
    """
    body = request(scenario.model, harness.held_out(scenario.model)[: scenario.rows])
    answer_bytes = len(framed(_call(server.address, body)))
    load = scenario.load
    with tempfile.TemporaryDirectory(prefix="bench-") as name, contextlib.ExitStack() as stack:
        path, log_path = Path(name) / "body", Path(name) / "log"
        path.write_bytes(framed(body))
        checker = stack.enter_context(checking(server, scenario)) if scenario.checked else None
        ok_before = _ok(server)
        if checker is not None:
            checker.go()
        seconds = times.warm_up + times.window + 0.3
        process = h2load.start(h2load.command(server.address, path, load, seconds, log_path))
        time.sleep(times.warm_up)
        before = server.scrape() if server.metrics else None
        stolen = harness.stolen_seconds(server_core)
        begin, cpu = time.time(), server.cpu_seconds()
        time.sleep(times.window)
        end, cpu = time.time(), server.cpu_seconds() - cpu
        stolen = harness.stolen_seconds(server_core) - stolen
        after = server.scrape() if server.metrics else None
        summary = h2load.finish(process, seconds + 30)
        checks = checker.finish() if checker is not None else None
        log = h2load.read_log(log_path).between(begin, end)
    if not len(log.took):
        raise BenchmarkError(f"{scenario.name}: not one request was answered in the {times.window:g} s of the window")
    checked_inside = sum(begin <= t < end for t in checks["ended"]) if checks else 0
    p50, p99 = np.percentile(log.took, (50, 99)) * 1e6
    found: dict[str, Any] = {
        "requests": len(log.took) + checked_inside,
        "requests_per_second": len(log.took) / (end - begin),
        "cpu_us": cpu / (len(log.took) + checked_inside) * 1e6,
        "cpu_share": cpu / (end - begin),
        "stolen_share": stolen / (end - begin),
        "p50_us": float(p50),
        "p99_us": float(p99),
        "h2load_answers": summary.succeeded,
    }
    if before is not None and after is not None:
        rows, batches = (
            after.total(name) - before.total(name) for name in ("forwardpass_rows_total", "forwardpass_batches_total")
        )
        found["batch_rows"] = rows / batches if batches else 0.0
    problems = []
    if summary.failed or not log.ok.all():
        problems.append(f"h2load saw {summary.failed} failures")
    if not 0 <= summary.data_bytes - summary.succeeded * answer_bytes <= load.in_flight * answer_bytes:
        problems.append(
            f"{summary.succeeded} answers of {answer_bytes} bytes expected, {summary.data_bytes} bytes came: not all "
            "of them were answers"
        )
    if checks is not None:
        found |= {key: checks[key] for key in ("checked", "wrong")}
        problems += _audit(ok_before, _ok(server), summary, checks, load)
    return found | {"problems": problems}


def _audit(ok_before: float, ok_after: float, summary: h2load.Summary, checks: dict[str, Any], load: Load) -> list[str]:
    """What does not add up between what the clients saw and what the server says it answered."""
    problems = []
    answered, seen = ok_after - ok_before, summary.succeeded + checks["checked"]
    # What was in flight when h2load's time was up was answered too, but nobody was there to see it.
    if not 0 <= answered - seen <= load.in_flight:
        problems.append(f"the server counts {answered:.0f} OK, the clients {seen}")
    if checks["wrong"]:
        problems.append(f"{checks['wrong']} of {checks['checked']} checked answers WRONG: {checks['first_wrong']}")
    if checks["failed"]:
        problems.append(f"{checks['failed']} checked calls failed: {checks['first_failure']}")
    if not checks["checked"]:
        problems.append("nothing was checked")
    return problems


def _ok(server: Server) -> float:
    return server.scrape().total("forwardpass_requests_total", code="OK") if server.metrics else 0.0


def _call(address: str, body: bytes) -> bytes:
    with grpc.insecure_channel(address) as channel:
        answer: bytes = channel.unary_unary(harness.METHOD)(body, timeout=10, wait_for_ready=True)
        return answer


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
def checking(server: Server, scenario: Scenario) -> Iterator[Checker]:
    rate = CHECKS_BESIDE_ONE_STREAM if scenario.load.in_flight == 1 else CHECKS_PER_SECOND
    command = [sys.executable, str(harness.HERE / "checker.py")]
    command += [server.address, scenario.model, str(scenario.rows), str(rate)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "checking":
            raise BenchmarkError("the checking client did not start; what it said is above")
        yield Checker(process)
    finally:
        harness.end(process, 5.0)
