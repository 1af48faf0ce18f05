"""Requests a second and their latency over gRPC, the same network on the CPU provider and on CUDA, on one machine.

The server has half of the cores and the load the other half. The load is `forwardpass loadtest`'s closed loop: it needs
nothing that the server does not.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import mlp_file
from forwardpass.loadtest import request_bodies as requests
from forwardpass.loadtest.target import LoadClient, LoadTarget
from gpu_cases import NETWORKS
from harness import BenchmarkError

WARM_UP = 2.0  # seconds
PROCESSES = 4  # of the load, at most


@dataclass(frozen=True, slots=True)
class Scenario:
    """One server under one load."""

    network: str
    provider: str  # cpu or cuda
    in_flight: int
    rows: int = 1  # of a request

    @property
    def key(self) -> str:
        return f"{self.network}/{self.provider}/{self.in_flight}/{self.rows}"


SCENARIOS = tuple(
    Scenario(network, provider, in_flight, rows)
    for network in ("64-256-256-10", "1024-4096-4096-1000")
    for in_flight, rows in ((1, 1), (64, 1), (512, 1), (64, 16))
    for provider in ("cpu", "cuda")
)


def halves(cores: set[int]) -> tuple[frozenset[int], list[int]]:
    """The server's cores and the load's. Raises BenchmarkError where there are not two."""
    ordered = sorted(cores)
    if len(ordered) < 2:
        raise BenchmarkError("server and load need a core each, and this process may use one only")
    middle = len(ordered) // 2
    return frozenset(ordered[:middle]), ordered[middle:]


def measure(scenario: Scenario, seconds: float) -> dict[str, Any]:
    """One server, one load, the figures. Raises BenchmarkError, or what the client raises."""
    servers, loads = halves(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as name:
        repository = Path(name)
        mlp_file.write(repository / "mlp" / "1" / "model.onnx", mlp_file.layers(NETWORKS[scenario.network]))
        with harness.serve(repository, servers, "--provider", scenario.provider) as server:
            model = requests.info(server.address, "mlp")
            messages = requests.make(model, "", {scenario.rows: 1.0}, None, 0)
            client = LoadClient(processes=min(PROCESSES, len(loads)), core=loads[0], warm_up=WARM_UP)
            target = LoadTarget(server.address, "mlp", messages, client, metrics_url=server.metrics)
            found = target.closed(scenario.in_flight, seconds)
            on = server.scrape().by("forwardpass_model_info", "provider")
    batch_rows = (found.server or {}).get("batch_rows", {}).get("mean")
    return {
        "requests_per_second": found.throughput,
        "p50_us": found.quantile(0.5) * 1e6,
        "p99_us": found.quantile(0.99) * 1e6,
        "failed": None if not found.recording.failed else f"{found.recording.failed} requests failed",
        "batch_rows": batch_rows,
        "provider": ", ".join(on),
    }
