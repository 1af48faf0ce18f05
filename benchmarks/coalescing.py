"""Rows per second of many threads that call one Client, with their calls sharing requests and without.

    python benchmarks/coalescing.py [--seconds 2] [--rounds 5] [--callers 64]

A real server of `digits` on one core; on the other this process, whose threads call predict(row) as fast as they are
answered. Plain and coalesced clients take turns, and each round has its own ratio, so that a slow minute of the machine
falls on both. Every answer is compared, bit for bit, with what a plain client got for the same row. Tasks of an
AsyncClient are measured in the same way, and shown; so are fewer callers.

Verdict: with 64 threads the median ratio is at least 5, and no answer was wrong. Exit status: 0 when that holds; 1
otherwise; 2 when it cannot be run here.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import harness
from forwardpass import AsyncClient, Client
from forwardpass.client import Coalesce
from harness import BenchmarkError, Server

WARM_UP = 0.3  # seconds of each measurement that are not counted
FEWER = (1, 4, 16)  # callers, beside those of the verdict
WANTED = 5.0

Rows = NDArray[np.float32]
Answers = list[bytes]
Load = Callable[[str, int, float, Rows, Answers, Coalesce | None], dict[str, float]]


class Tally:
    """What callers count while they call, each in its own place."""

    def __init__(self, callers: int, seconds: float) -> None:
        now = time.monotonic()
        self.begin, self.end = now + WARM_UP, now + WARM_UP + seconds
        self.answered = [0] * callers
        self.wrong = [0] * callers

    def figures(self, seconds: float, cpu: float, rows: int, requests: int) -> dict[str, float]:
        answered = sum(self.answered)
        return {
            "rows_per_second": answered / seconds,
            "wrong": sum(self.wrong),
            "client_cpu_us": cpu / answered * 1e6 if answered else 0.0,  # of the process, warm-up included
            "rows_per_request": rows / requests if requests else 1.0,
        }


def threads(
    address: str, callers: int, seconds: float, rows: Rows, expected: Answers, coalesce: Coalesce | None
) -> dict[str, float]:
    """Threads of one Client, each with rows of its own."""
    with Client(address, coalesce=coalesce) as client:
        client.predict("digits", rows[0])
        tally = Tally(callers, seconds)

        def call(caller: int) -> None:
            answered = wrong = 0
            place = caller
            while (now := time.monotonic()) < tally.end:
                got = client.predict("digits", rows[place])
                answered += now >= tally.begin
                wrong += got.tobytes() != expected[place]
                place = (place + callers) % len(rows)
            tally.answered[caller], tally.wrong[caller] = answered, wrong

        running = [threading.Thread(target=call, args=(caller,)) for caller in range(callers)]
        began = time.process_time()
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        spent = time.process_time() - began
        counts = client.counts
        share = seconds / (seconds + WARM_UP)
        return tally.figures(seconds, spent * share, counts.shared_rows, counts.shared_requests)


def tasks(
    address: str, callers: int, seconds: float, rows: Rows, expected: Answers, coalesce: Coalesce | None
) -> dict[str, float]:
    """Tasks of one AsyncClient, each with rows of its own."""

    async def run() -> dict[str, float]:
        async with AsyncClient(address, coalesce=coalesce) as client:
            await client.predict("digits", rows[0])
            tally = Tally(callers, seconds)

            async def call(caller: int) -> None:
                place = caller
                while (now := time.monotonic()) < tally.end:
                    got = await client.predict("digits", rows[place])
                    tally.answered[caller] += now >= tally.begin
                    tally.wrong[caller] += got.tobytes() != expected[place]
                    place = (place + callers) % len(rows)

            began = time.process_time()
            await asyncio.gather(*map(call, range(callers)))
            spent = time.process_time() - began
            counts = client.counts
            share = seconds / (seconds + WARM_UP)
            return tally.figures(seconds, spent * share, counts.shared_rows, counts.shared_requests)

    return asyncio.run(run())


def rounds(load: Load, server: Server, callers: int, args: argparse.Namespace, rows: Rows, expected: Answers) -> Any:
    """Plain and coalesced in turns: the figures of each, and the ratio of each round."""
    found: dict[str, list[Any]] = {"plain": [], "coalesced": [], "ratios": []}
    for turn in range(args.rounds):
        # Who goes first takes turns as well.
        order = [("plain", None), ("coalesced", Coalesce())][:: -1 if turn % 2 else 1]
        for name, coalesce in order:
            found[name].append(load(server.address, callers, args.seconds, rows, expected, coalesce))
        rates = [found[name][-1]["rows_per_second"] for name in ("plain", "coalesced")]
        found["ratios"].append(rates[1] / rates[0])
    return found


def _line(name: str, found: dict[str, list[Any]]) -> str:
    def median(kind: str, figure: str) -> float:
        return float(statistics.median(each[figure] for each in found[kind]))

    return (
        f"{name:<12} {median('plain', 'rows_per_second'):>10,.0f} {median('coalesced', 'rows_per_second'):>12,.0f} "
        f"{statistics.median(found['ratios']):>8.2f} {min(found['ratios']):>7.2f} {max(found['ratios']):>7.2f} "
        f"{median('plain', 'client_cpu_us'):>10.1f} {median('coalesced', 'client_cpu_us'):>13.1f} "
        f"{median('coalesced', 'rows_per_request'):>13.1f}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rows per second of many callers of one client, coalesced and plain.")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each comparison (default: %(default)s)")
    parser.add_argument("--callers", type=int, default=64, help="threads, or tasks (default: %(default)s)")
    parser.add_argument("--only", action="store_true", help="measure what the verdict is about and nothing else")
    parser.add_argument("--keep", action="store_true", help="record the result in benchmarks/results")
    args = parser.parse_args(argv)
    loads: list[tuple[str, Load, int]] = [(f"{args.callers} threads", threads, args.callers)]
    if not args.only:
        loads += [(f"{args.callers} tasks", tasks, args.callers)]
        loads += [(f"{count} thread{'s' * (count > 1)}", threads, count) for count in FEWER]
    figures: dict[str, Any] = {}
    try:
        cores = harness.pin()
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            folder = harness.repository(Path(name), ["digits"])
            with harness.serve(folder, cores.server) as server:
                rows = np.ascontiguousarray(harness.held_out("digits")[:256], np.float32)
                with Client(server.address) as client:
                    expected = [client.predict("digits", row).tobytes() for row in rows]
                print(
                    f"{'':<12} {'plain':>10} {'coalesced':>12} {'ratio':>8} {'least':>7} {'most':>7} "
                    f"{'CPU µs/row':>10} {'coalesced':>13} {'rows/request':>13}"
                )
                for what, load, callers in loads:
                    figures[what] = rounds(load, server, callers, args, rows, expected)
                    print(_line(what, figures[what]), flush=True)
    except BenchmarkError as error:
        print(f"coalescing: {error}", file=sys.stderr)
        return 2
    wrong = sum(each["wrong"] for found in figures.values() for kind in ("plain", "coalesced") for each in found[kind])
    decisive = figures[loads[0][0]]
    ratio = statistics.median(decisive["ratios"])
    verdicts = [
        (f"{wrong:.0f} answers were wrong (none)", wrong == 0),
        (f"{loads[0][0]} that share requests get {ratio:.1f}x the rows of those that do not (at least {WANTED:g}x)",
         ratio >= WANTED),
    ]  # fmt: skip
    return harness.conclude("coalescing", cores, {"figures": figures}, verdicts, args.keep)


if __name__ == "__main__":
    sys.exit(main())
