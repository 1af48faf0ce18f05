"""From a result of bench_gpu.py to tables: on the terminal, and in docs/performance-gpu.md.

    python benchmarks/gpu_report.py     renders the newest benchmarks/results/gpu-*.json into docs/performance-gpu.md

Medians of several windows; ratios are those of the medians. Needs nothing but the standard library.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import gpu_memory
from gpu_cases import COPY, DEVICE, HOST, MATMUL, NETWORKS, PRECISIONS, ROOF, Case, Floors, Roofs, floors
from report import HERE, RATIO_HEAD, Ratio, aligned, piped

DOCS = HERE.parent / "docs" / "performance-gpu.md"
RESULTS = HERE / "results"
# Between them this writes.
BEGIN, END = "<!-- gpu: rendered by benchmarks/gpu_report.py -->", "<!-- gpu: end -->"
NONE = "No run on a device has been recorded yet: nothing in this document has been measured."

SMALL, LARGE = "64-256-256-10", "1024-4096-4096-1000"
FLAT_BYTES = 2 << 20  # the least that the driver hands out at a time

Result = dict[str, Any]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def seconds(result: Result, case: Case) -> float | None:
    """The median of a case's windows; None where it was not measured."""
    windows = result["cases"].get(case.key, {}).get("seconds")
    return statistics.median(windows) if windows else None


def roofs(result: Result, precision: str) -> Roofs | None:
    """What the device was measured to do; None where that failed."""
    copied = result["cases"].get(Case(ROOF, 0, "fp32", COPY).key, {}).get("per_second")
    rate = result["cases"].get(Case(ROOF, 0, precision, MATMUL).key, {}).get("per_second")
    return Roofs(copied, rate) if copied and rate else None


def floor(result: Result, network: str, batch: int, precision: str) -> Floors | None:
    known = roofs(result, precision)
    return floors(network, batch, precision, known) if known is not None else None


def ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


# -- what is asked ----------------------------------------------------------------------------------------------------


def verdicts(result: Result) -> list[Ratio]:
    """What is asked of a device, as far as this result tells."""
    found: list[Ratio] = []

    def add(what: str, value: float | None, target: float, at_most: bool, digits: int = 2) -> None:
        if value is not None:
            found.append(Ratio(what, value, target, None, at_most, digits))

    def host(network: str, batch: int, way: str) -> float | None:
        return seconds(result, Case(network, batch, "fp32", way))

    for batch in (1, 64):
        ours = host(SMALL, batch, "forwardpass")
        add(f"plain run to graph, {SMALL}, {batch} rows", ratio(host(SMALL, batch, "ort"), ours), 2.0, False)
        theirs = host(SMALL, batch, "torch-graph")
        add(f"graph to PyTorch's with CUDA graphs, {SMALL}, {batch} rows", ratio(ours, theirs), 1.0, True)
    device, products = host(LARGE, 4096, "ort-graph.device"), host(LARGE, 4096, "matmul.device")
    add(f"graph to the same products by torch.matmul, {LARGE}, 4096 rows", ratio(device, products), 1.3, True)
    memory = result.get("memory", {})
    if "used" in memory:
        grown = gpu_memory.growth(memory["used"]) / 2**20
        add(f"MiB of device memory more after {memory['batches']:,} mixed batches", grown, FLAT_BYTES / 2**20, True, 1)
        add("wrong answers among them", memory["wrong"], 0, True, 0)
    return found


def failures(result: Result) -> list[str]:
    """What could not be measured, and why."""
    found = [f"{key}: {figures['failed']}" for key, figures in result["cases"].items() if figures.get("failed")]
    if result.get("memory", {}).get("failed"):
        found.append(f"mixed batches: {result['memory']['failed']}")
    return found + [f"{key}: {f['failed']}" for key, f in result.get("serving", {}).items() if f.get("failed")]


# -- tables -----------------------------------------------------------------------------------------------------------


def tables(result: Result) -> list[tuple[str, Table]]:
    """(title, table) of everything that was measured, or tried."""
    found = []
    for precision in PRECISIONS:
        for title, table in (
            (f"From host to host, {precision}, µs a batch", _host(result, precision)),
            (f"On the device alone, {precision}, µs a batch", _device(result, precision)),
        ):
            if table[1]:
                found.append((title, table))
    serving = _serving(result)
    if serving[1]:
        found.append(("Over gRPC", serving))
    asked = [one.row for one in verdicts(result)]
    return [*found, ("What is asked", (RATIO_HEAD, asked))] if asked else found


def _tried(result: Result, precision: str, ways: dict[str, str]) -> list[tuple[str, int]]:
    tried = [Case.of(key) for key in result["cases"]]
    return [
        (network, batch)
        for network in NETWORKS
        for batch in sorted({c.batch for c in tried})
        if any((c.network, c.batch, c.precision) == (network, batch, precision) and c.way in ways for c in tried)
    ]


def _cell(result: Result, case: Case) -> str:
    figures = result["cases"].get(case.key)
    if figures is None:
        return "-"
    return "failed" if figures.get("failed") else _us(statistics.median(figures["seconds"]))


def _us(value: float | None) -> str:
    """Microseconds to three digits or the whole."""
    if value is None:
        return "-"
    us = value * 1e6
    return f"{us:,.0f}" if us >= 99.95 else f"{us:.1f}" if us >= 1 else f"{us:.2f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _host(result: Result, precision: str) -> Table:
    head = ("network", "rows", *HOST.values(), "plain / Forwardpass", "Forwardpass / PyTorch graph")
    rows: list[tuple[str, ...]] = []
    for network, batch in _tried(result, precision, HOST):
        cells = [_cell(result, Case(network, batch, precision, way)) for way in HOST]
        plain, ours, theirs = (
            seconds(result, Case(network, batch, precision, way)) for way in ("ort", "forwardpass", "torch-graph")
        )
        rows.append((network, str(batch), *cells, _times(ratio(plain, ours)), _times(ratio(ours, theirs))))
    return head, rows


def _device(result: Result, precision: str) -> Table:
    head = (
        "network", "rows", *DEVICE.values(), "Forwardpass's run", "floor: memory", "floor: products",
        "graph / larger floor",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for network, batch in _tried(result, precision, DEVICE):
        cells = [_cell(result, Case(network, batch, precision, way)) for way in DEVICE]
        least = floor(result, network, batch, precision)
        graph = seconds(result, Case(network, batch, precision, "ort-graph.device"))
        bounds = ("-", "-", "-") if least is None else (
            _us(least.memory), _us(least.products), _times(ratio(graph, least.larger)),
        )  # fmt: skip
        ours = result["cases"].get(Case(network, batch, precision, "forwardpass").key, {}).get("device_run")
        rows.append((network, str(batch), *cells, _us(ours), *bounds))
    return head, rows


def _serving(result: Result) -> Table:
    head = ("network", "in flight", "rows a request", "provider", "requests/s", "p50 ms", "p99 ms", "rows/batch")
    rows: list[tuple[str, ...]] = []
    for key, figures in result.get("serving", {}).items():
        network, provider, in_flight, count = key.split("/")
        if "requests_per_second" not in figures:
            rows.append((network, in_flight, count, provider, "failed", "-", "-", "-"))
            continue
        mean = figures["batch_rows"]
        rows.append(
            (
                network,
                in_flight,
                count,
                figures["provider"] or provider,
                f"{figures['requests_per_second']:,.0f}",
                f"{figures['p50_us'] / 1e3:.3f}",
                f"{figures['p99_us'] / 1e3:.3f}",
                "-" if mean is None else f"{mean:.1f}",
            )
        )
    return head, rows


def heading(result: Result) -> str:
    """What it was measured on, in a sentence or two."""
    its = result["device"]
    if not its:
        return f"{result['date']}: no device could be used."
    packages = ", ".join(f"{name} {version}" for name, version in its["packages"].items())
    known = roofs(result, "fp32")
    measured = (
        f" Measured on it: {known.bytes_per_second / 1e9:,.0f} GB/s between two places in its memory, "
        f"{known.flops_per_second / 1e12:,.1f} TFLOP/s in an FP32 product."
        if known is not None
        else ""
    )
    return (
        f"Measured on {result['date']}: {its['name']}, {its['memory'] / 2**30:.0f} GiB, driver {its['driver']}; Python "
        f"{its['python']}; {packages}. Medians of {result['windows']} windows of {result['window_seconds']:g} s."
        f"{measured}"
    )


def text(result: Result) -> str:
    """For a terminal."""
    parts = [f"{title}\n{aligned(*table)}" for title, table in tables(result)]
    return "\n\n".join([heading(result), *parts, *_failed(result)])


def markdown(result: Result | None) -> str:
    """For the document."""
    if result is None:
        return NONE
    parts = [f"### {title}\n\n{piped(*table)}" for title, table in tables(result)]
    return "\n\n".join([heading(result), *parts, *_failed(result)])


def _failed(result: Result) -> list[str]:
    lines = failures(result)
    return ["Could not be measured:\n\n" + "\n".join(f"- {line}" for line in lines)] if lines else []


# -- the document -----------------------------------------------------------------------------------------------------


def newest(folder: Path = RESULTS) -> Result | None:
    """The newest committed result, by the date in its name."""
    paths = sorted(folder.glob("gpu-*.json"))
    if not paths:
        return None
    found: Result = json.loads(paths[-1].read_text("utf-8"))
    return found


def rendered(document: str, tables_: str) -> str:
    """The document with what stands between its markers replaced. Raises ValueError where one is missing."""
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise ValueError(f"expected one {BEGIN!r} and one {END!r} after it")
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables_}\n\n{END}{after}"


def main() -> int:
    DOCS.write_text(rendered(DOCS.read_text("utf-8"), markdown(newest())), "utf-8")
    print(f"{DOCS} rendered")
    return 0


if __name__ == "__main__":
    sys.exit(main())
