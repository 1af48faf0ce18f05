"""Goodput against offered load when every request has a deadline: with deadline scheduling, and without.

    python benchmarks/deadlines.py [--seconds 4] [--modes scheduled unscheduled untold]

An overloaded server that works through its queue in order answers everybody late. What counts is how many answers
come in time, so that is what is measured, at the client: openloop.py sends on a Poisson schedule whatever has been
answered, counts time from when a request was due, never ends a call itself, and compares every answer's bytes. h2load
could not do it: it waits for answers before it sends more, and cannot tell an answer from a refusal. The server's
metrics only say why requests were refused.

The network is slow (about 5 ms a batch) so that one client on one core can offer twice what the server sustains, and
sustained is what a closed loop of 64 requests gets answered per second. Three servers of the same network take turns:

    scheduled    deadline_scheduling on, its default
    unscheduled  deadline_scheduling off: first come, first served, what has expired is dropped
    untold       requests carry no deadline: the server cannot know it

Verdict, for `scheduled` at twice the sustained load: at least 90 % of the answers in time, goodput within 15 % of its
peak. Exit status: 0 when both hold; 1 otherwise, or when an answer was wrong; 2 when it cannot be run here.

Of a quick network (--width 64 --layers 2 --max-batch 64 --deadline-ms 50) the transport is the bottleneck, not the
runs. Then openloop.py must be able to send twice what the server sustains, or its own lateness is in the figures
(client_late_p99_ms).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import h2load
import harness
import networks
import openloop
from bodies import framed
from h2load import Load
from harness import BenchmarkError, Server
from openloop import Body

DEADLINE = 0.020  # seconds
LOADS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)  # of the sustained load
WIDTH, LAYERS, MAX_BATCH = 2048, 4, 8
WARM_UP = 1.0  # seconds of each point that are not counted
PATIENCE = 1.0  # seconds after the last request that answers are waited for
IN_TIME, WITHIN = 0.90, 0.85

MODES = {"scheduled": "", "unscheduled": "deadline_scheduling = false\n", "untold": ""}


def sustained(server: Server, body: Body) -> float:
    """Requests per second that a closed loop of 64 gets answered."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        path, log = Path(name) / "body", Path(name) / "log"
        path.write_bytes(framed(body.message))
        began, before = time.time(), server.scrape()
        h2load.finish(h2load.start(h2load.command(server.address, path, Load(4, 16), 4.0, log)), 30.0)
        answered = server.scrape().total("forwardpass_requests_total", code="OK") - before.total(
            "forwardpass_requests_total", code="OK"
        )
        entries = h2load.read_log(log)
        if not len(entries.took) <= answered <= len(entries.took) + 64:
            raise BenchmarkError(f"h2load counts {len(entries.took)} answers, the server {answered:.0f}")
        return len(entries.between(began + 1.0, began + 4.0).took) / 3.0


def point(
    server: Server, bodies: Sequence[Body], rate: float, told: bool, seconds: float, deadline: float = DEADLINE
) -> dict[str, Any]:
    """One load on one server: rates per second over the time after the warm-up."""
    before = server.scrape()
    times = openloop.poisson(rate, WARM_UP + seconds, seed=int(rate))
    outcome = openloop.run(server.address, bodies, times, deadline if told else None, PATIENCE)
    _wait_idle(server)
    after = server.scrape()
    counted = outcome.between(outcome.due[0] + WARM_UP, np.inf)
    answered = counted.count(openloop.OK)
    latencies = counted.latencies()
    reasons = after.by("forwardpass_refused_total", "reason")
    for reason, count in before.by("forwardpass_refused_total", "reason").items():
        reasons[reason] -= count
    return {
        "offered": len(counted.due) / seconds,
        "answered": answered / seconds,
        "goodput": counted.in_time(deadline) / seconds,
        "in_time": counted.in_time(deadline) / answered if answered else 0.0,
        "wrong": outcome.count(openloop.WRONG),
        "refused": counted.count(openloop.REFUSED) / seconds,
        "unanswered": counted.count(openloop.WAITING) / seconds,
        "p50_ms": float(np.percentile(latencies, 50) * 1e3) if answered else None,
        "p99_ms": float(np.percentile(latencies, 99) * 1e3) if answered else None,
        "client_late_p99_ms": float(np.percentile(counted.lateness(), 99) * 1e3),
        "reasons": {reason: count for reason, count in reasons.items() if count},
    }


def _wait_idle(server: Server) -> None:
    deadline = time.monotonic() + 20.0
    while server.scrape().total("forwardpass_in_flight_requests"):
        if time.monotonic() > deadline:
            raise BenchmarkError("requests were still in flight 20 s after their clients had gone")
        time.sleep(0.05)


def verdicts(points: Sequence[dict[str, Any]]) -> list[tuple[str, bool]]:
    """What is asked of the scheduled server, and whether it holds. `points`: its own, the heaviest load last."""
    peak, last = max(p["goodput"] for p in points), points[-1]
    kept = last["goodput"] / peak if peak else 0.0
    load, in_time = f"at {last['load']:g}x the sustained load", last["in_time"]
    return [
        (f"{load}, {in_time:.1%} of the answers are in time (at least {IN_TIME:.0%})", in_time >= IN_TIME),
        (f"{load}, goodput is {kept:.1%} of its peak (at least {WITHIN:.0%})", kept >= WITHIN),
    ]


def plot(result: dict[str, Any], path: Path) -> bool:
    """Goodput against offered load, as SVG. False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "forwardpass"  # the same figures make the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    labels = {
        "scheduled": "deadline scheduling",
        "unscheduled": "first come, first served",
        "untold": "no deadline given",
    }
    for mode, points in result["points"].items():
        axes.plot([p["offered"] for p in points], [p["goodput"] for p in points], marker="o", label=labels[mode])
    most = max(p["offered"] for points in result["points"].values() for p in points)
    axes.plot([0, most], [0, most], color="grey", linewidth=0.8, linestyle=":", label="all in time")
    axes.axvline(result["sustained"], color="grey", linewidth=0.8, label="sustained")
    axes.set_xlabel("offered, requests/s")
    axes.set_ylabel(f"answered within {result['deadline_ms']:g} ms, requests/s")
    axes.set_ylim(0, 1.15 * result["sustained"])
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True


def _table(result: dict[str, Any]) -> str:
    head = f"{'load':>5} {'offered/s':>10} {'answered/s':>11} {'in time/s':>10} {'in time':>8} {'p99 ms':>8}"
    lines = [f"{'':<12} {head}"]
    for mode, points in result["points"].items():
        for p in points:
            p99 = "-" if p["p99_ms"] is None else f"{p['p99_ms']:.1f}"
            lines.append(
                f"{mode:<12} {p['load']:>4g}x {p['offered']:>10,.0f} {p['answered']:>11,.0f} {p['goodput']:>10,.0f} "
                f"{p['in_time']:>8.1%} {p99:>8}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Goodput against offered load under deadlines.")
    parser.add_argument("--seconds", type=float, default=4.0, help="counted at each point (default: %(default)s)")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--loads", nargs="+", type=float, default=list(LOADS), help="of the sustained load")
    parser.add_argument("--width", type=int, default=WIDTH, help="of a row and each layer (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=LAYERS, help="(default: %(default)s)")
    parser.add_argument("--max-batch", type=int, default=MAX_BATCH, help="rows (default: %(default)s)")
    parser.add_argument("--deadline-ms", type=float, default=DEADLINE * 1e3, help="(default: %(default)g)")
    parser.add_argument("--keep", action="store_true", help="record the result in benchmarks/results")
    args = parser.parse_args(argv)
    deadline = args.deadline_ms / 1e3
    points: dict[str, list[dict[str, Any]]] = {mode: [] for mode in args.modes}
    try:
        h2load.require()
        cores = harness.pin()
        with tempfile.TemporaryDirectory(prefix="bench-") as name, contextlib.ExitStack() as stack:
            servers = {}
            for mode in args.modes:
                options = f"max_batch_size = {args.max_batch}\n{MODES[mode]}"
                folder = networks.repository(Path(name) / mode, "slow", args.width, args.layers, options)
                servers[mode] = stack.enter_context(harness.serve(folder, cores.server))
            bodies = networks.bodies(folder, "slow", 64)
            capacity = sustained(servers[args.modes[0]], bodies[0])
            print(f"sustained: {capacity:,.0f} requests/s", file=sys.stderr, flush=True)
            for load in sorted(args.loads):
                for mode, server in servers.items():
                    found = point(server, bodies, load * capacity, mode != "untold", args.seconds, deadline)
                    points[mode].append({"load": load} | found)
                    print(f"{mode} {load:g}x: {found['goodput']:,.0f}/s in time", file=sys.stderr, flush=True)
    except BenchmarkError as error:
        print(f"deadlines: {error}", file=sys.stderr)
        return 2
    figures = {"deadline_ms": args.deadline_ms, "sustained": capacity, "points": points}
    print(_table(figures))
    image = (harness.RESULTS if args.keep else harness.OUT) / "deadlines.svg"
    image.parent.mkdir(parents=True, exist_ok=True)
    if plot(figures, image):
        print(f"\nthe curve is in {image}")
    wrong = sum(p["wrong"] for of_mode in points.values() for p in of_mode)
    held = [(f"{wrong} answers were wrong (none)", wrong == 0)]
    if "scheduled" in points:
        held += verdicts(points["scheduled"])
    return harness.conclude("deadlines", cores, figures, held, args.keep)


if __name__ == "__main__":
    sys.exit(main())
