"""`forwardpass sweep`: throughput and latency against batch size, row by row and as one product, with the roofline.

Runs the server's session on each available provider, with arrays in host memory. The roofs are measured on the same
provider with the same threads (see roofline). The knee is the max_batch_size of a model that does not set it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.console.tables import si, table
from forwardpass.errors import ForwardpassError, InsightError
from forwardpass.execution.providers import available, open_session, place
from forwardpass.execution.session import Session
from forwardpass.insight import batch_sizes, cost, figures, model_argument, ort_profile, roofline
from forwardpass.insight.model_argument import Source
from forwardpass.model.onnx_graph import open_graph
from forwardpass.repository.knee import RUN_COST, SIZES, SURPLUS, knee

_SIZES = tuple(1 << power for power in range(13))
_LOOP_SECONDS = 1.0  # a loop expected to take longer is not run


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One batch size. Seconds are medians for a whole batch."""

    rows: int
    product: float  # as one matrix product
    loop: float | None  # row by row; None if that would take too long
    compute_roof: float | None  # the minimum seconds for its arithmetic; None if unknown
    memory_roof: float | None  # the minimum seconds for its bytes; None if unknown


@dataclass(frozen=True, slots=True)
class Sweep:
    """The results for one provider."""

    provider: str
    threads: int
    roofs: roofline.Roofs
    points: tuple[SweepPoint, ...]
    knee: int  # rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model_argument.add_arguments(parser)
    parser.add_argument(
        "--batches", type=batch_sizes.parse, default=_SIZES, metavar="B,B,...", help="batch sizes [1,2,4...4096]"
    )
    parser.add_argument(
        "--provider", action="append", metavar="NAME", help="cpu or cuda:N; may be repeated [every one there is]"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads inside a run [%(default)s]")
    parser.add_argument(
        "--seconds", type=float, default=0.05, metavar="S", help="for each batch size, loop and product [%(default)s]"
    )
    figures.add_argument(parser, "throughput and latency against batch size")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Measure every provider, print, draw. Raises InsightError if none can be measured."""
    found = model_argument.find(args.model, args.repository)
    sweeps = []
    for provider in args.provider or available():
        try:
            sweeps.append(sweep(found, provider, args.threads, args.batches, args.seconds))
        except ForwardpassError as error:
            print(f"forwardpass sweep: {provider} is left out: {error}", file=sys.stderr)
    if not sweeps:
        raise InsightError("no provider could be measured")
    if args.png is not None:
        figures.save(_figure(found.title, sweeps), args.png)
    if args.json:
        print(json.dumps({"model": found.title, "providers": [_report(s) for s in sweeps]}, indent=1))
    else:
        print("\n\n".join(_text(found, s) for s in sweeps))
    return 0


def sweep(found: Source, provider: str, threads: int, sizes: Sequence[int], seconds: float) -> Sweep:
    """Measure one provider at these batch sizes. Raises ForwardpassError if it or the network cannot be run."""
    placement = place(provider, threads, "as asked")
    session = open_session(found.path, placement)
    if not session.signature.batchable:
        raise InsightError(f"{found.title}: axis 0 is not a batch of any size")
    if placement.devices:
        feeds = ort_profile.example_rows(open_graph(found.path, 1), found.contract)
        half = found.contract is not None and found.contract.precision == "fp16"
        session.prepare(max(sizes), True, [feeds[tensor.name] for tensor in session.signature.inputs], half)
    limits = roofline.measure(placement)
    graph = open_graph(found.path, 1)
    feeds = ort_profile.example_rows(graph, found.contract)
    # Tensors inside a fused node never reach memory: bytes are counted between the nodes actually executed.
    groups = [step.covers for step in ort_profile.execute(graph, found.path, feeds, 0.01).steps]
    weights = cost.total(cost.of_node(graph, node) for node in graph.nodes)
    outputs = session.signature.default_outputs
    points = []
    for rows in sizes:
        graph = open_graph(found.path, rows)
        feeds = ort_profile.example_rows(graph, found.contract)
        arrays = [feeds[tensor.name] for tensor in session.signature.inputs]
        singles = [[np.ascontiguousarray(a[i : i + 1]) for a in arrays] for i in range(rows)]
        one = _seconds(partial(session.run, singles[0], outputs), 0.0)

        flops = cost.total(cost.of_node(graph, node) for node in graph.nodes).flops
        moved = cost.moved_bytes(graph, groups)
        points.append(
            SweepPoint(
                rows,
                _seconds(partial(session.run, arrays, outputs), seconds),
                _seconds(partial(_loop, session, singles, outputs), seconds) if one * rows < _LOOP_SECONDS else None,
                None if flops is None else limits.compute_seconds(flops),
                None if moved is None else limits.memory_seconds(weights.weight_bytes + moved),
            )
        )
    # The server chooses only among SIZES.
    tried = [(point.rows, point.product) for point in points if point.rows in SIZES]
    tried = tried or [(point.rows, point.product) for point in points]
    return Sweep(placement.label, threads, limits, tuple(points), knee(tried))


def _loop(session: Session, rows: Sequence[Sequence[NDArray[Any]]], outputs: tuple[int, ...]) -> None:
    for row in rows:
        session.run(row, outputs)


def _seconds(run: Callable[[], Any], enough: float) -> float:
    """Median seconds of a run, over at least three runs and `enough` seconds."""
    run()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < enough:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def said(one: Sweep) -> str:
    """Summary of the figures, as text."""
    at = {point.rows: point for point in one.points}
    first, chosen = one.points[0], at[one.knee]
    best = max(one.points, key=lambda point: point.rows / point.product)
    text = (
        f"knee: {one.knee} rows, the least power of four up to {SIZES[-1]:,} whose rows cost at most {SURPLUS:.0%} "
        f"(in long runs: somewhat) more than in an endless batch, with the {si(RUN_COST, 's')} that a run costs the "
        "server beside the network\nat the knee: "
        f"{si(one.knee / chosen.product)} rows/s in {si(chosen.product, 's')} a batch; {first.rows} row(s): "
        f"{si(first.rows / first.product)} rows/s in {si(first.product, 's')}; best: {best.rows} rows, "
        f"{si(best.rows / best.product)} rows/s"
    )
    if chosen.loop is not None:
        text += (
            f"\none product of {one.knee} rows is {chosen.loop / chosen.product:.1f} times as fast as a loop over them"
        )
    return text


def _text(found: Source, one: Sweep) -> str:
    rows = []
    for point in one.points:
        roof = _roof(point)
        rows.append(
            [
                f"{point.rows:,}" + (" *" if point.rows == one.knee else "  "),
                si(point.product, "s"),
                si(point.rows / point.product),
                "-" if point.loop is None else si(point.rows / point.loop),
                "-" if point.loop is None else f"{point.loop / point.product:.1f}",
                "?" if point.compute_roof is None else si(point.rows / point.compute_roof),
                "?" if point.memory_roof is None else si(point.rows / point.memory_roof),
                "?" if roof is None else f"{roof / point.product:.1%}",
            ]
        )
    headers = ["rows  ", "a batch", "rows/s", "loop rows/s", "gain", "compute roof", "memory roof", "of the roof"]
    speeds = ", ".join(f"{si(speed, 'B/s')} over {si(size, 'B')}" for size, speed in one.roofs.bandwidths)
    return (
        f"{found.title} on {one.provider}, {one.threads} thread(s)\n"
        f"roofs: {si(one.roofs.flops, 'FLOP/s')} in the fastest of some products; copies: {speeds}\n"
        f"{table(headers, rows)}\n{said(one)}"
    )


def _roof(point: SweepPoint) -> float | None:
    """The minimum seconds by both roofs, or by the known one; None if neither is known."""
    known = [seconds for seconds in (point.compute_roof, point.memory_roof) if seconds is not None]
    return max(known) if known else None


def _report(one: Sweep) -> dict[str, Any]:
    return {
        "provider": one.provider,
        "threads": one.threads,
        "flops_per_second": one.roofs.flops,
        "copies": [{"bytes": size, "bytes_per_second": speed} for size, speed in one.roofs.bandwidths],
        "knee_rows": one.knee,
        "points": [
            {
                "rows": p.rows,
                "product_seconds": p.product,
                "loop_seconds": p.loop,
                "compute_roof_seconds": p.compute_roof,
                "memory_roof_seconds": p.memory_roof,
            }
            for p in one.points
        ],
    }


def _figure(title: str, sweeps: Sequence[Sweep]) -> Any:
    drawn, axes = figures.figure(2, len(sweeps), 4.6)
    for row, one in enumerate(sweeps):
        left, right = axes[2 * row], axes[2 * row + 1]
        sizes = [point.rows for point in one.points]
        looped = [point for point in one.points if point.loop is not None]
        left.plot(sizes, [p.rows / p.product for p in one.points], "o-", color=figures.hue(0), label="one product")
        left.plot([p.rows for p in looped], [p.rows / p.loop for p in looped if p.loop], "s-", color=figures.hue(1))
        right.plot(sizes, [p.product * 1e6 for p in one.points], "o-", color=figures.hue(0))
        right.plot([p.rows for p in looped], [p.loop * 1e6 for p in looped if p.loop], "s-", color=figures.hue(1))
        left.lines[-1].set_label("a loop over rows")
        if all(p.compute_roof and p.memory_roof for p in one.points):
            for name, style, words in (("compute_roof", "--", "compute roof"), ("memory_roof", ":", "memory roof")):
                ceiling = [getattr(p, name) for p in one.points]
                left.plot(sizes, [r / s for r, s in zip(sizes, ceiling, strict=True)], style, color="#444", label=words)
                right.plot(sizes, [seconds * 1e6 for seconds in ceiling], style, color="#444")
        for axis, words in ((left, "throughput (rows/s)"), (right, "time of a batch (µs)")):
            axis.axvline(one.knee, color=figures.hue(3), alpha=0.7, label=f"knee: {one.knee} rows")
            figures.log_axis(axis, sizes)
            axis.set_yscale("log")
            axis.set_xlabel("rows in the batch")
            axis.set_ylabel(words)
            axis.set_title(f"{one.provider}, {one.threads} thread(s)")
            axis.tick_params(axis="x", rotation=45, labelsize=9)
    drawn.suptitle(f"{title}: batch size, throughput and latency", fontsize=12)
    handles, names = axes[0].get_legend_handles_labels()
    if len(sweeps) > 1:
        names[-1] = "knee"
    drawn.legend(handles, names, loc="outside lower center", ncols=len(names))
    return drawn
