"""How many processes a server takes where `--processes auto` leaves it to the server. Reads sizes of files only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final, NamedTuple

from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.execution.providers import place
from forwardpass.settings import Settings
from forwardpass.transport.http2 import sockets

# Seconds of a core that one small request takes in the transport, and that a network takes for each byte of its
# weights: as measured on the machine of docs/performance.md (15 us, and 1.6 ms a row of 100 MB). Only their ratio
# matters here.
TRANSPORT_SECONDS: Final = 15e-6
SECONDS_PER_BYTE: Final = 1.6e-11
WEIGHTS: Final = (".onnx", ".ort", ".bin", ".data", ".weights")


class ProcessCount(NamedTuple):
    """How many, and why in words."""

    processes: int
    why: str


def of(settings: Settings, cores: CpuBudget) -> ProcessCount:
    """The number of processes of a server, as it is set or as it is chosen."""
    if settings.processes:
        return ProcessCount(settings.processes, "as configured")
    if settings.model_control == "on-demand":
        return ProcessCount(1, "models are loaded on demand, by one")
    if settings.transport == "grpcio" or not sockets.AVAILABLE:
        return ProcessCount(1, "several need the direct transport")
    on_cpu = settings.provider == "cpu" or (settings.provider == "auto" and not place("auto", 1, "").devices)
    return choose(cores, smallest_weights(settings.repository), on_cpu)


def choose(cores: CpuBudget, weights: int | None, on_cpu: bool) -> ProcessCount:
    """Enough processes that receiving keeps all cores busy, and no more: a network's runs use cores by themselves.

    `weights`: bytes of the smallest network's weights; None: there is none. `on_cpu`: False where networks run on a
    device, which one process keeps busy.
    """
    if not on_cpu:
        return ProcessCount(1, "networks run on a device, which one process keeps busy")
    if weights is None:
        return ProcessCount(cores.count, f"one for each core ({cores.why})")
    run = weights * SECONDS_PER_BYTE
    share = TRANSPORT_SECONDS / (TRANSPORT_SECONDS + run)
    count = max(1, min(cores.count, math.ceil(cores.count * share)))
    why = f"the smallest network has {weights / 1e6:.3g} MB of weights, a row of which takes about {run * 1e6:.2g} us"
    if count == cores.count:
        return ProcessCount(count, f"one for each core ({cores.why}): {why}")
    return ProcessCount(count, f"{why}: its runs take the other cores ({cores.why})")


def smallest_weights(repository: Path) -> int | None:
    """Bytes of the smallest network in a repository, by its files; None: there is none that can be read."""
    found: dict[Path, int] = {}
    try:
        for path in repository.rglob("*"):
            if path.suffix in WEIGHTS and path.is_file():
                found[path.parent] = found.get(path.parent, 0) + path.stat().st_size
    except OSError:
        return None
    return min(found.values(), default=None)
