"""Many models in one server: how soon it is ready, what it holds, what scrapes do to calls, what a call costs.

    python benchmarks/many_models.py [--models 1000] [--shapes 1] [--widths 64 64 10]

The models are small networks with weights of their own, in as many shapes as asked for. The server may use every core,
as the client does: this is about one machine with many models, not about what a core can do (bench.py). Then:

    scrape   /metrics is fetched by a process of its own, again and again, while calls arrive at a steady rate for 16 of
             the models (openloop.py, every answer compared); the same calls without scrapes come before and after
    cost     CPU time of the server for a request, with a few in flight, for 1, 16 and 256 models in turn

Verdict: the bounds below. Exit status: 0 when all hold, 1 otherwise, 2 when it cannot be run here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import harness
import mlp_file
import openloop
from bodies import framed, request
from harness import BenchmarkError, Server
from openloop import Body, Connection

CALLED = 16  # models that the steady calls are for
RATE, SECONDS, ROUNDS = 500.0, 4.0, 5  # of the steady calls, calm and during scrapes in turns
SPREADS = (1, 16, 256)  # models in turn
IN_FLIGHT = 16
REQUESTS = 20_000  # for the cost of one: its CPU time is read in clock ticks
START_SECONDS = 600.0

READY_SECONDS, RSS_MB, THREADS, SCRAPE_SECONDS, MOVED_MS = 20.0, 700, 40, 0.3, 5.0


def repository(folder: Path, models: int, shapes: int, widths: Sequence[int]) -> list[str]:
    """Write the models, with widths that differ from shape to shape, and return their names."""
    names = [f"net-{i:04}" for i in range(models)]
    for i, name in enumerate(names):
        inner = [width + i % shapes for width in widths[1:-1]]
        network = mlp_file.layers([widths[0], *inner, widths[-1]], seed=i)
        mlp_file.write(folder / name / "1" / "model.onnx", network)
    return names


def bodies(folder: Path, names: Sequence[str], width: int) -> list[Body]:
    """A request of one row for each model, with what ONNX Runtime answers."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    rows = np.random.default_rng(1).normal(0, 1, (len(names), width)).astype(np.float32)
    found = []
    for name, row in zip(names, rows, strict=True):
        path = folder / name / "1" / "model.onnx"
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found.append(Body(request(name, row[None]), session.run(None, {"x": row[None]})[0].tobytes()))
    return found


@contextmanager
def scrapes(url: str) -> Iterator[list[tuple[float, int]]]:
    """Scrape one after another in a process of its own. The list has (seconds, bytes) of each, once it is over."""
    code = (
        "import sys, time, urllib.request\n"
        "while True:\n"
        "    began = time.monotonic()\n"
        "    size = len(urllib.request.urlopen(sys.argv[1], timeout=60).read())\n"
        "    print(time.monotonic() - began, size, flush=True)\n"
        "    time.sleep(0.25)\n"
    )
    found: list[tuple[float, int]] = []
    process = subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE, text=True)
    try:
        yield found
    finally:
        process.terminate()
        said, _ = process.communicate()
        for line in said.splitlines():
            seconds, size = line.split()
            found.append((float(seconds), int(size)))


def steady(server: Server, calls: Sequence[Body], seed: int) -> NDArray[np.float64]:
    """Seconds that each of the steady calls took. Raises BenchmarkError if any was not answered right."""
    outcome = openloop.run(server.address, calls, openloop.poisson(RATE, SECONDS, seed), None, 60.0)
    if outcome.count(openloop.OK) != len(outcome.due):
        raise BenchmarkError(f"{len(outcome.due) - outcome.count(openloop.OK)} of {len(outcome.due)} calls failed")
    return outcome.latencies()


def cost(server: Server, calls: Sequence[Body]) -> float:
    """Microseconds of the server's CPU time a request, of REQUESTS for the models of `calls` in turn."""
    connection = Connection(server.address)
    block = openloop.header_block(server.address, None)
    messages = [framed(body.message) for body in calls]
    sent = done = 0
    began = server.cpu_seconds()
    try:
        while done < REQUESTS:
            while sent < REQUESTS and sent - done < IN_FLIGHT:
                connection.request(sent, block, messages[sent % len(messages)])
                sent += 1
            connection.flush()
            for index, kind, payload in connection.receive():
                if kind == openloop.DATA and not payload.endswith(calls[index % len(calls)].expected):
                    raise BenchmarkError("an answer was wrong")
                done += kind != openloop.DATA
    finally:
        connection.close()
    return (server.cpu_seconds() - began) / REQUESTS * 1e6


def measure(folder: Path, names: Sequence[str], width: int) -> dict[str, Any]:
    began = time.monotonic()
    with harness.serve(folder, os.sched_getaffinity(0), patience=START_SECONDS) as server:
        found: dict[str, Any] = {"ready_seconds": time.monotonic() - began}
        held = harness.footprint(server.pid)
        found |= {"rss_mb": held.rss / 1e6, "threads": held.threads}
        print(
            f"ready after {found['ready_seconds']:.1f} s, {found['rss_mb']:.0f} MB, {held.threads} threads", flush=True
        )
        calls = bodies(folder, names[: max(SPREADS)], width)
        few = calls[:CALLED]
        steady(server, few, 0)
        calm, during, took = [], [], []
        for i in range(ROUNDS):
            calm.append(steady(server, few, 2 * i + 1))
            with scrapes(server.metrics) as scraped:
                during.append(steady(server, few, 2 * i + 2))
            took += scraped
        if not took:
            raise BenchmarkError(f"not one scrape ended within {SECONDS:g} s")
        for name, parts in (("calm", calm), ("scraped", during)):
            # The median of the rounds', since other programs may hold up one of them.
            p50, p99 = (np.median([np.percentile(part, q) for part in parts]) * 1e3 for q in (50, 99))
            found |= {f"{name}_p50_ms": float(p50), f"{name}_p99_ms": float(p99)}
        # The first one of all makes what later ones find made.
        found |= {
            "scrape_seconds": float(np.median([seconds for seconds, _ in took])),
            "scrape_longest_seconds": max(seconds for seconds, _ in took),
            "scrape_mb": took[-1][1] / 1e6,
        }
        print(
            f"a scrape takes {found['scrape_seconds']:.3f} s (at most {found['scrape_longest_seconds']:.3f} s), has "
            f"{found['scrape_mb']:.2f} MB\ncalls' p50 and p99: {found['calm_p50_ms']:.2f} and "
            f"{found['calm_p99_ms']:.2f} ms; during scrapes {found['scraped_p50_ms']:.2f} and "
            f"{found['scraped_p99_ms']:.2f} ms",
            flush=True,
        )
        found["cost_us"] = {}
        for spread in SPREADS:
            if spread <= len(calls):
                cost(server, calls[:spread])
                found["cost_us"][str(spread)] = cost(server, calls[:spread])
        said = ", ".join(f"{us:.0f} µs for {spread}" for spread, us in found["cost_us"].items())
        print(f"a request costs, with {IN_FLIGHT} in flight for so many models in turn: {said}", flush=True)
        held = harness.footprint(server.pid)
        found |= {"rss_mb_after": held.rss / 1e6, "threads_after": held.threads}
        print(f"afterwards {found['rss_mb_after']:.0f} MB, {held.threads} threads", flush=True)
    return found


def verdicts(found: dict[str, Any]) -> list[tuple[str, bool]]:
    """What is asked, and whether it holds."""
    ready, took = found["ready_seconds"], found["scrape_seconds"]
    moved = found["scraped_p99_ms"] - found["calm_p99_ms"]
    return [
        (f"ready after {ready:.1f} s (under {READY_SECONDS:g} s)", ready < READY_SECONDS),
        (f"{found['rss_mb']:.0f} MB (under {RSS_MB} MB)", found["rss_mb"] < RSS_MB),
        (f"{found['threads']} threads (under {THREADS})", found["threads"] < THREADS),
        (f"a scrape in {took:.3f} s (under {SCRAPE_SECONDS:g} s)", took < SCRAPE_SECONDS),
        (f"scrapes move calls' p99 by {moved:+.1f} ms (less than {MOVED_MS:g} ms)", moved < MOVED_MS),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure a server of many models.")
    parser.add_argument("--models", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--shapes", type=int, default=1, help="how many shapes they have (default: %(default)s)")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[64, 64, 10], help="of their layers (default: 64 64 10)"
    )
    parser.add_argument("--keep", action="store_true", help="record the result in benchmarks/results")
    args = parser.parse_args(argv)
    try:
        every = sorted(os.sched_getaffinity(0))
        cores = harness.Cores(every[0], every[-1])
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            names = repository(Path(name), args.models, args.shapes, args.widths)
            found = measure(Path(name), names, args.widths[0])
    except BenchmarkError as error:
        print(f"many_models: {error}", file=sys.stderr)
        return 2
    figures = {"models": args.models, "shapes": args.shapes, "widths": args.widths, **found}
    return harness.conclude("many_models", cores, figures, verdicts(found), args.keep)


if __name__ == "__main__":
    sys.exit(main())
