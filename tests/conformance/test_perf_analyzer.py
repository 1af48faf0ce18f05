"""Triton's perf_analyzer against a server, in each of its ways to call: that it gets what it needs and ends well.

How fast the server is, is not asked here: only that every level was measured, and that server and tool count alike.
"""

from __future__ import annotations

import csv
import fcntl
import os
import re
import tempfile
from pathlib import Path

import pytest
from tests.conformance.tool import Tool

from forwardpass.testing.server_process import ServerProcess

WAYS = {
    "sync": ["-i", "grpc"],
    "async": ["-i", "grpc", "--async"],
    "streaming": ["-i", "grpc", "--streaming"],
    "shared memory": ["-i", "grpc", "--shared-memory", "system"],
    "http": ["-i", "http"],
    "http async": ["-i", "http", "--async"],
    "http shared memory": ["-i", "http", "--shared-memory", "system"],
}
# Windows of half a second. Three in a row must agree within this many per cent, or perf_analyzer fails; how even a
# shared machine is is not the question here.
BRIEF = ["-p", "500", "-s", "900"]


def measure(tool: Tool, server: ServerProcess, way: str, levels: str, report: Path) -> list[dict[str, str]]:
    """A row for each level of concurrency."""
    address = server.http_url.partition("://")[2] if way.startswith("http") else server.address
    words = ["-m", "digits", "-u", address, *WAYS[way], "--concurrency-range", levels, *BRIEF]
    # It calls its shared memory by the tensors' names alone, so two of it on one machine would share that too.
    with (Path(tempfile.gettempdir()) / f"forwardpass-perf-analyzer-{os.getuid()}.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        said = tool.run(*words, "-f", report)
    for trouble in ("Failed to", "failed to", "Unable to", "Thread [", "error"):
        assert trouble not in said, said
    counts = [int(n) for n in re.findall(r"Inference count: (\d+)", said)]
    assert counts and all(counts), said
    with report.open(newline="") as file:
        return sorted(csv.DictReader(file), key=lambda row: int(row["Concurrency"]))


# Of the ways, those that every run of the tests takes: 4 s each.
QUICK = ("sync", "http shared memory")


@pytest.mark.parametrize("way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_a_few_levels_of_concurrency(perf_analyzer: Tool, served: ServerProcess, way: str, tmp_path: Path) -> None:
    rows = measure(perf_analyzer, served, way, "1:8:7", tmp_path / "report.csv")
    assert [row["Concurrency"] for row in rows] == ["1", "8"]
    assert all(float(row["Inferences/Second"]) > 0 for row in rows)
    assert all(float(row["Server Compute Infer"]) >= 0 for row in rows), "the server's statistics are in the report"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_level_of_concurrency(perf_analyzer: Tool, served: ServerProcess, way: str, tmp_path: Path) -> None:
    rows = measure(perf_analyzer, served, way, "1:8", tmp_path / "report.csv")
    assert [row["Concurrency"] for row in rows] == [str(level) for level in range(1, 9)]
