"""One measurement: a server, a load, a window in the middle of it, and proof that what came back were answers.

Requests are counted by the client: those whose answer was complete inside the window. CPU time is the server process's
own over the same window, so neither start-up nor warm-up is in it. The generator checks every answer of the whole run;
then the server must have counted as many OK as there were.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import harness
import traffic
from h2load import Load
from harness import BenchmarkError, Server
from traffic import Mix, Summary


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one measurement."""

    warm_up: float
    window: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is sent to which server, how hard. Its name is WHAT/MIX/LOAD."""

    what: str  # a key of report.TITLES
    mix: Mix
    load: Load
    server: str = ""  # a key of bench.SERVERS; `what` where it is left out
    repository: str = "digits"  # what it serves, or what the requests to an echo are made for
    models: tuple[str, ...] = field(default=("digits",))
    rows: int = 1  # in a request

    @property
    def name(self) -> str:
        return f"{self.what}/{self.mix.name}/{self.load}"

    @property
    def started(self) -> str:
        return self.server or self.what

    @property
    def tls(self) -> bool:
        return self.started == "tls"


def measure(
    server: Server, scenario: Scenario, program: Path, requests: Path, server_core: int, times: Times
) -> dict[str, Any]:
    """The raw figures of one measurement, as JSON has them. Times are in microseconds, rates per second.

    `problems` says what was wrong with the answers; empty is what it should be.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        log_path = Path(name) / "log"
        ok_before = _ok(server)
        seconds = times.warm_up + times.window + 0.3
        process = traffic.start(
            program, server.address, requests, scenario.load, seconds, scenario.mix, log_path, scenario.tls
        )
        time.sleep(times.warm_up)
        before = server.scrape() if server.metrics else None
        stolen = harness.stolen_seconds(server_core)
        begin, cpu = time.time(), server.cpu_seconds()
        time.sleep(times.window)
        end, cpu = time.time(), server.cpu_seconds() - cpu
        stolen = harness.stolen_seconds(server_core) - stolen
        after = server.scrape() if server.metrics else None
        summary = traffic.finish(process, seconds + 30)
        log = traffic.read_log(log_path).between(begin, end)
    if not len(log.took):
        raise BenchmarkError(f"{scenario.name}: not one request was answered in the {times.window:g} s of the window")
    p50, p99 = np.percentile(log.took, (50, 99)) * 1e6
    found: dict[str, Any] = {
        "requests": len(log.took),
        "requests_per_second": len(log.took) / (end - begin),
        "cpu_us": cpu / len(log.took) * 1e6,
        "cpu_share": cpu / (end - begin),
        "stolen_share": stolen / (end - begin),
        "load_share": summary.cpu_seconds / summary.seconds,
        "p50_us": float(p50),
        "p99_us": float(p99),
        "checked": summary.right + summary.wrong,
        "wrong": summary.wrong,
        "inexact": summary.inexact,
    }
    if before is not None and after is not None:
        rows, batches = (
            after.total(name) - before.total(name) for name in ("forwardpass_rows_total", "forwardpass_batches_total")
        )
        found["batch_rows"] = rows / batches if batches else 0.0
    problems = audit(summary, _ok(server) - ok_before if server.metrics else None)
    return found | {"problems": problems}


def audit(summary: Summary, answered: float | None) -> list[str]:
    """What does not add up in what the client saw, and with the OK that the server counts (None: it counts none)."""
    problems = []
    seen = summary.right + summary.wrong
    if summary.wrong:
        problems.append(f"{summary.wrong} of {seen} answers WRONG; the first problem: {summary.first_problem}")
    if summary.failed:
        problems.append(f"{summary.failed} of {summary.sent} calls failed; the first problem: {summary.first_problem}")
    if summary.unanswered:
        problems.append(f"{summary.unanswered} calls had no answer")
    if answered is not None and not 0 <= answered - seen <= summary.unanswered:
        problems.append(f"the server counts {answered:.0f} OK, the client {seen}")
    return problems


def _ok(server: Server) -> float:
    return server.scrape().total("forwardpass_requests_total", code="OK") if server.metrics else 0.0
