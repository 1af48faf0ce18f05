"""`forwardpass memory`: memory of a forward pass with autograd's cache, without it, and in the server's session.

Each point is measured in a process of its own (memory_probe describes the method). Then a server is started and sent
requests while its resident memory is sampled, to show that it keeps nothing of a request. Linux only: reads the
kernel's high-water mark.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forwardpass.client import Client
from forwardpass.console.tables import si, table
from forwardpass.errors import InsightError
from forwardpass.insight import batch_sizes, figures, model_argument, ort_profile
from forwardpass.insight.model_argument import Source
from forwardpass.model.contract import MODEL_FILE
from forwardpass.model.onnx_graph import open_graph
from forwardpass.testing.server_process import ServerProcess

MODES = {
    "autograd": "PyTorch, kept for backward",
    "no_grad": "PyTorch, no_grad",
    "inference_mode": "PyTorch, inference_mode",
    "session": "the server's session",
}
_PANELS = (("peak memory of a pass", "MB"), ("time of a row", "µs"), ("a server's memory", "MB resident"))
_SAMPLES = 20  # intervals between readings of the server's memory
_MOST_ROWS = 8  # per request to the server; requests cycle from 1 row to this many
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


@dataclass(frozen=True, slots=True)
class MemoryPoint:
    """One pass. Bytes are relative to the memory before it."""

    mode: str
    rows: int
    peak: int
    held: int  # resident after the pass, while its output is held
    seconds: float
    saved: int  # bytes kept for the backward pass, by PyTorch's own count; 0 without autograd


@dataclass(frozen=True, slots=True)
class Served:
    """A server's resident bytes while it was sent requests."""

    requests: tuple[int, ...]  # sent so far, at each reading
    resident: tuple[int, ...]

    @property
    def slope(self) -> float:
        """Bytes per request, fitted to the second half, when everything has grown to its final size."""
        half = len(self.requests) // 2
        return float(np.polyfit(self.requests[half:], self.resident[half:], 1)[0])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model_argument.add_arguments(parser)
    parser.add_argument(
        "--batches",
        type=batch_sizes.parse,
        default=(1, 64, 256, 1024, 4096, 16384),
        metavar="B,B,...",
        help="batch sizes",
    )
    parser.add_argument(
        "--requests", type=int, default=20000, metavar="N", help="requests to a server; 0: none [%(default)s]"
    )
    figures.add_argument(parser, "memory and time against batch size")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Measure, print, draw. Raises InsightError."""
    if not Path("/proc/self/clear_refs").exists():
        raise InsightError("needs Linux: the high-water mark of /proc/self/status, and /proc/self/clear_refs")
    if importlib.util.find_spec("torch") is None:
        raise InsightError("needs torch, which is not installed: pip install 'forwardpass[train]'")
    found = model_argument.find(args.model, args.repository)
    points = list(measure(found.path, args.batches))
    served = serve(found, args.requests) if args.requests > 0 else None
    if args.png is not None:
        figures.save(_figure(found.title, points, served), args.png)
    if args.json:
        print(json.dumps(_report(found, points, served), indent=1))
    else:
        print(f"{found.title}: one forward pass, bytes over what was there before it; one thread")
        print(_table(points))
        print("\n".join(said(points, served)))
    return 0


def measure(path: Path, sizes: Sequence[int]) -> Iterator[MemoryPoint]:
    """Measure every mode at every batch size. Raises InsightError with the reason if a pass cannot be run."""
    command = [sys.executable, "-m", "forwardpass.insight.memory_probe"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **_ONE_THREAD}
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for rows in sizes:
            for mode in MODES:
                print(json.dumps({"path": str(path), "mode": mode, "rows": rows}), file=process.stdin, flush=True)
                line = process.stdout.readline()
                answer: dict[str, Any] = json.loads(line) if line else {"error": "the measuring process ended"}
                if "error" in answer:
                    raise InsightError(f"{MODES[mode]}, {rows} rows: {answer['error']}")
                yield MemoryPoint(mode, rows, answer["peak"], answer["held"], answer["seconds"], answer["saved"])
        process.stdin.close()


def serve(found: Source, requests: int) -> Served:
    """Start a server with only this model, send it `requests` requests, and read its memory along the way."""
    with tempfile.TemporaryDirectory(prefix="forwardpass-memory-") as folder:
        version = Path(folder) / found.name / "1"
        if found.version:
            shutil.copytree(found.path.parent, version)
        else:
            version.mkdir(parents=True)
            shutil.copy2(found.path, version / MODEL_FILE)
        rows = ort_profile.example_rows(open_graph(found.path, _MOST_ROWS), found.contract)
        looks = np.unique(np.linspace(0, requests, _SAMPLES + 1).astype(int))
        resident = []
        with ServerProcess(Path(folder)) as server, Client(server.address) as client:
            sent = 0
            for look in looks:
                while sent < look:
                    count = sent % _MOST_ROWS + 1
                    client.infer(found.name, {name: array[:count] for name, array in rows.items()})
                    sent += 1
                resident.append(_resident(server.pid))
    return Served(tuple(int(look) for look in looks), tuple(resident))


def _resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise InsightError(f"process {pid} shows no resident memory")


def said(points: Sequence[MemoryPoint], served: Served | None) -> list[str]:
    """Summary of the figures, in sentences."""
    largest = max(point.rows for point in points)
    at = {point.mode: point for point in points if point.rows == largest}
    kept, free, session = at["autograd"], at["no_grad"], at["session"]
    per_row = kept.saved / largest
    lines = [
        f"autograd keeps {per_row:,.0f} bytes a row for the backward pass, by PyTorch's own count",
        f"at {largest:,} rows it peaks at {si(kept.peak, 'B')}, against {si(free.peak, 'B')} under no_grad, and holds "
        f"{si(kept.held, 'B')} afterwards, against {si(free.held, 'B')}",
        f"the session's arena grows to {si(session.held, 'B')} and is used again by every later run of up to as many "
        "rows",
    ]
    if served is not None:
        mean_rows = (_MOST_ROWS + 1) / 2
        total = served.requests[-1]
        half = len(served.requests) // 2
        slope = round(served.slope, 1) + 0.0  # no minus zero
        lines.append(
            f"a server was at {si(served.resident[half], 'B')} after {served.requests[half]:,} requests and at "
            f"{si(served.resident[-1], 'B')} after {total:,}: {slope:+} bytes a request over the second half; "
            f"a backward cache kept for each would have been {mean_rows * per_row:,.0f} bytes a request"
        )
    return lines


def _table(points: Sequence[MemoryPoint]) -> str:
    rows = [
        [
            f"{point.rows:,}",
            MODES[point.mode],
            si(point.peak, "B"),
            si(point.held, "B"),
            f"{point.seconds * 1e3:.3g}",
            f"{point.seconds / point.rows * 1e6:.3g}",
        ]
        for point in points
    ]
    return table(["rows", "in", "peak", "held after", "ms", "µs/row"], rows, left=(1,))


def _report(found: Source, points: Sequence[MemoryPoint], served: Served | None) -> Mapping[str, Any]:
    return {
        "model": found.title,
        "points": [
            {
                "mode": p.mode,
                "rows": p.rows,
                "peak_bytes": p.peak,
                "held_bytes": p.held,
                "seconds": p.seconds,
                "saved_for_backward_bytes": p.saved,
            }
            for p in points
        ],
        "served": None
        if served is None
        else {"requests": served.requests, "resident_bytes": served.resident, "bytes_a_request": served.slope},
        "said": said(points, served),
    }


def _figure(title: str, points: Sequence[MemoryPoint], served: Served | None) -> Any:
    drawn, axes = figures.figure(3 if served is not None else 2, 1, 4.3)
    sizes = sorted({point.rows for point in points})
    for place, (mode, words) in enumerate(MODES.items()):
        own = [point for point in points if point.mode == mode]
        style = {"color": figures.hue(place), "marker": "os^D"[place], "markersize": 5}
        axes[0].plot(sizes, [point.peak / 1e6 for point in own], label=words, **style)
        axes[1].plot(sizes, [point.seconds / point.rows * 1e6 for point in own], **style)
    kept = [point for point in points if point.mode == "autograd"]
    axes[0].plot(sizes, [p.held / 1e6 for p in kept], "--", color=figures.hue(0), label="kept for backward, after it")
    for axis, (words, unit) in zip(axes, _PANELS, strict=False):
        axis.set_title(words)
        axis.set_ylabel(unit)
    figures.log_axis(axes[1], sizes)
    figures.log_scale(axes[1], [point.seconds / point.rows * 1e6 for point in points])
    for axis in axes[:2]:
        axis.set_xlabel("rows in the batch")
        axis.tick_params(labelsize=9)
        axis.tick_params(axis="x", rotation=45)
    if served is not None:
        axes[2].plot(served.requests, [nbytes / 1e6 for nbytes in served.resident], color=figures.hue(3), marker=".")
        axes[2].set_ylim(0, max(served.resident) * 1.3 / 1e6)
        axes[2].set_xlabel("requests answered")
        axes[2].tick_params(labelsize=9)
        axes[2].tick_params(axis="x", rotation=45)
    drawn.suptitle(f"{title}: memory of a forward pass, one thread", fontsize=12)
    handles, names = axes[0].get_legend_handles_labels()
    drawn.legend(handles, names, loc="outside lower center", ncols=3)
    return drawn
