"""`forwardpass plan`: how many cores (or GPUs) and pods a load needs, by simulation from a measured curve.

A curve is measured on one core (or GPU) of the kind to be bought, saved, and reused; `--check` measures that server at
loads other than the curve's and reports the simulation's error. Everything is measured several times, interleaved, and
medians count, because a machine's performance varies over time. Requests are assumed to spread evenly over cores.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forwardpass.console import arguments, connection_options
from forwardpass.errors import LoadTestError
from forwardpass.loadtest import capacity_model, measurement, objective_search, request_bodies
from forwardpass.loadtest.capacity_model import LATENCY_QUANTILES, Alone, Curve, Full, Observed
from forwardpass.loadtest.command import objective
from forwardpass.loadtest.measurement import Measurement, ms
from forwardpass.loadtest.report import charts, page
from forwardpass.loadtest.report.charts import Series
from forwardpass.loadtest.target import LoadClient, LoadTarget

IN_FLIGHT = 256  # calls in flight in the closed loop that measures the cost of a full batch
OVERLOAD = 1.25  # offered load relative to the throughput so far, to find whether more is possible
OVERLOAD_SECONDS = 2.0  # minimum: by the second half, everything due before the measurement has been answered
KEPT_UP = 0.97  # a server that answers this share of the offered load is not overloaded
FITTED_AT = (0.12, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.8, 0.9)  # shares of the capacity where the curve is measured
CHECKED_AT = (0.3, 0.5, 0.7, 0.85)  # shares of the capacity where it is checked
MOST_FAILED = 0.01  # share of failed requests above which a measurement does not count
MOST = 1e7  # requests/s, the end of the plots


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rate", type=arguments.rate, required=True, metavar="R", help="requests/s in all, such as 1e6"
    )
    parser.add_argument("--slo", type=objective, required=True, metavar="p99=10ms", help="what must hold on each core")
    parser.add_argument("--curve", type=Path, metavar="FILE", help="a curve that --save wrote")
    parser.add_argument("--target", metavar="HOST:PORT", help="a server on one core (or GPU), to measure the curve on")
    parser.add_argument("--model", help="its model")
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="rows of a request [%(default)s]")
    parser.add_argument(
        "--max-batch",
        type=arguments.count,
        metavar="N",
        help="the model's max_batch_size in rows [from the server's metadata]",
    )
    parser.add_argument(
        "--duration", type=arguments.seconds, default=2.5, metavar="S", help="of each measurement [%(default)s]"
    )
    parser.add_argument(
        "--rounds", type=arguments.count, default=5, metavar="N", help="measurements of each load [%(default)s]"
    )
    parser.add_argument("--core", type=int, metavar="N", help="pin the load generator to this core")
    parser.add_argument("--cores-per-pod", type=int, default=1, metavar="N", help="[%(default)s]")
    parser.add_argument(
        "--spare", type=float, default=0.0, metavar="SHARE", help="add this share of cores [%(default)s]"
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the curve")
    parser.add_argument("--check", action="store_true", help="compare the simulation with the server at several loads")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page with plots")
    parser.add_argument("--json", action="store_true", help="print JSON")
    connection_options.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure or read a curve, plan, check, report. Raises LoadTestError."""
    target = None
    access = connection_options.access_of(args)
    if args.target is not None:
        if args.model is None:
            raise LoadTestError("--target needs --model")
        requests = request_bodies.make(
            request_bodies.info(args.target, args.model, access=access), "", {args.rows: 1.0}, None, args.seed
        )
        client = LoadClient(core=args.core, processes=1, warm_up=0.5, seed=args.seed, access=access)
        target = LoadTarget(args.target, args.model, requests, client)
    if args.check and target is None:
        raise LoadTestError("--check needs --target and --model")
    windows: dict[float, list[Measurement]] = {}
    if args.curve is not None:
        curve = _read(args.curve)
        if args.check:
            assert target is not None
            windows = in_turns(target, [share * curve.capacity for share in CHECKED_AT], args.duration, 2 * args.rounds)
    elif target is not None:
        also = CHECKED_AT if args.check else ()
        rows = args.max_batch or request_bodies.max_batch_rows(args.target, args.model, access)
        curve, windows = measure(target, max(1, rows // args.rows), args.duration, args.rounds, also)
    else:
        raise LoadTestError("give --curve FILE, or --target HOST:PORT and --model to measure one")
    if args.save:
        args.save.write_text(json.dumps(curve.as_json(), indent=1) + "\n", "utf-8")
    planned = plan(curve, args.rate, args.slo, args.cores_per_pod, args.spare, args.seed)
    checked = [compare(curve, rate, points, args.slo.q, args.seed) for rate, points in windows.items()]
    print(
        json.dumps({**planned, "check": checked}, indent=1) if args.json else _text(curve, planned, checked, args.slo)
    )
    if args.report:
        args.report.write_text(_html(curve, planned, checked, args), "utf-8")
    return 0


def _read(path: Path) -> Curve:
    try:
        return Curve.from_json(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise LoadTestError(f"{path}: {error}") from None


def measure(
    target: LoadTarget, max_batch: int, seconds: float, rounds: int, also: Sequence[float] = ()
) -> tuple[Curve, dict[float, list[Measurement]]]:
    """The curve of a server that has one core to itself, and check measurements by rate.

    The check measurements are taken at the shares `also` of the capacity, interleaved with the curve's own and twice as
    often, but are not used for the fit. Raises LoadTestError if requests fail.
    """
    full = _sound(_told(target.closed(IN_FLIGHT, seconds)))
    sustained, limited = sustained_rate(target, full.throughput, seconds)
    lone: list[Measurement] = []
    fitted = [share * sustained for share in FITTED_AT]
    checked = [share * sustained for share in also]
    windows = in_turns(target, sorted([*fitted, *checked, *checked]), seconds, rounds, lone)
    curve = capacity_model.fit(
        target.model,
        target.requests.mean_rows,
        max_batch,
        Full(full.throughput, IN_FLIGHT, sustained, limited),
        Alone(sum(point.recording.total_latency for point in lone), seconds * len(lone)),  # type: ignore[arg-type]
        [Observed(rate, tuple(typical(windows[rate], q) for q in LATENCY_QUANTILES)) for rate in fitted],
    )
    return curve, {rate: windows[rate] for rate in checked}


def sustained_rate(target: LoadTarget, start: float, seconds: float) -> tuple[float, bool]:
    """Requests/s answered under overload, which is the rate that drains a full queue; and whether the client was the
    limit.

    A closed loop cannot measure this: its clients wait for each other, for better (full batches) and for worse. Nor can
    the highest rate that works for a while: above the sustained rate, the queue never recovers from the first long
    stall. Raises LoadTestError if no request is answered.
    """
    offered = OVERLOAD * start
    seconds = max(seconds, OVERLOAD_SECONDS)
    while True:
        points = [_told(target.at_rate(offered, seconds)) for _ in range(2)]
        answered = min(point.answered_late for point in points)
        if not answered:
            raise LoadTestError(f"of {offered:,.0f} requests/s none was answered in time: there is no capacity to plan")
        limited = any(point.busy > measurement.BUSY for point in points)
        if answered < KEPT_UP * offered or limited:
            return answered, limited
        offered *= OVERLOAD


def in_turns(
    target: LoadTarget, rates: Sequence[float], seconds: float, rounds: int, lone: list[Measurement] | None = None
) -> dict[float, list[Measurement]]:
    """Measure all rates in order in each round, after a one-call closed loop whose result is appended to `lone`."""
    found: dict[float, list[Measurement]] = {rate: [] for rate in rates}
    for _ in range(rounds):
        if lone is not None:
            lone.append(_sound(_told(target.closed(1, seconds))))
        for rate in rates:
            found[rate].append(_told(target.at_rate(rate, seconds)))
    return found


def _told(point: Measurement) -> Measurement:
    print(measurement.line(point), file=sys.stderr)
    return point


def _sound(point: Measurement) -> Measurement:
    if not point.recording.ok or point.errors > MOST_FAILED:
        raise LoadTestError(f"nothing to plan with: {measurement.line(point)}; {point.recording.by_outcome()}")
    return point


def typical(points: Sequence[Measurement], q: float) -> float:
    """The median of a quantile in seconds over the measurements without client saturation or too many failures, or over
    all unless those are a majority. Raises LoadTestError if nothing was answered."""
    points = [point for point in points if point.recording.ok]
    if not points:
        raise LoadTestError("nothing was answered at one of the loads: there is nothing to plan with")
    good = [point for point in points if not point.saturation and point.errors <= MOST_FAILED]
    return statistics.median(point.quantile(q) for point in (good if 2 * len(good) > len(points) else points))


def plan(
    curve: Curve, rate: float, objective: objective_search.Objective, cores_per_pod: int, spare: float, seed: int
) -> dict[str, Any]:
    """The capacity that the load needs. Raises LoadTestError if a request on an idle core misses the objective."""
    most = capacity_model.highest_rate(curve, objective.q, objective.seconds, seed)
    if not most:
        alone = capacity_model.quantile(curve, 0.001 * curve.capacity, objective.q, seed)
        raise LoadTestError(
            f"{objective} cannot be met by more cores: p{100 * objective.q:g} on an idle one is {ms(alone)}"
        )
    cores = math.ceil(rate / most * (1.0 + spare))
    pods = math.ceil(cores / cores_per_pod)
    each = rate / (pods * cores_per_pod)
    return {
        "model": curve.model,
        "rate": rate,
        "objective": str(objective),
        "rate_per_core": most,
        "capacity_per_core": curve.capacity,
        "cores": pods * cores_per_pod,
        "pods": pods,
        "cores_per_pod": cores_per_pod,
        "load_of_a_core": each / curve.capacity,
        "predicted_seconds": capacity_model.quantile(curve, each, objective.q, seed),
    }


def compare(curve: Curve, rate: float, points: Sequence[Measurement], q: float, seed: int) -> dict[str, float]:
    """The prediction and the measurements at a rate; error: predicted / measured - 1."""
    each = [point.quantile(q) for point in points if point.recording.ok]
    predicted, actual = capacity_model.quantile(curve, rate, q, seed), typical(points, q)
    return {
        "load": round(rate / curve.capacity, 3),
        "rate": rate,
        "predicted_seconds": predicted,
        "measured_seconds": actual,
        "lowest_seconds": min(each),
        "highest_seconds": max(each),
        "measurements": len(each),
        "client_saturated": sum(bool(point.saturation) for point in points),
        "requests": min(point.recording.ok for point in points),
        "error": predicted / actual - 1.0,
    }


def _text(
    curve: Curve, planned: dict[str, Any], checked: Sequence[dict[str, float]], objective: objective_search.Objective
) -> str:
    stalled = sum(curve.stalls) / len(curve.stalls) if curve.stalls else 0.0
    lines = [
        f"{curve.model}, {curve.rows:g} row(s) a request: a batch of n requests keeps a core for "
        f"{curve.a * 1e6:.0f} + {curve.b * 1e6:.1f}·n µs, and {curve.d * 1e6:.0f} µs on the way; "
        f"{curve.stalls_per_second:.1f} stalls/s of {ms(stalled)} on average",
        f"one core: at most {planned['capacity_per_core']:,.0f} requests/s, {planned['rate_per_core']:,.0f} with "
        f"{objective}",
        f"{planned['rate']:,.0f} requests/s: {planned['cores']:,} cores in {planned['pods']:,} pods, each core "
        f"{planned['load_of_a_core']:.0%} loaded, predicted p{100 * objective.q:g} {ms(planned['predicted_seconds'])}",
    ]
    if planned["cores_per_pod"] > 1:
        lines.append(
            f"each pod with --processes {planned['cores_per_pod']}, where networks run on its cores: one process "
            "receives and answers on one core (docs/processes.md)"
        )
    if curve.client_limited:
        lines.insert(
            1, "the client reached its limit before the server did: the capacity is at least the one shown here"
        )
    for point in checked:
        late = f"; the client was late in {point['client_saturated']:.0f}" if point["client_saturated"] else ""
        lines.append(
            f"  at {point['load']:.0%} of the capacity, {point['rate']:,.0f}/s: predicted "
            f"{ms(point['predicted_seconds'])}, measured {ms(point['measured_seconds'])}, {point['error']:+.0%} "
            f"({point['measurements']:.0f} measurements: {ms(point['lowest_seconds'])} to "
            f"{ms(point['highest_seconds'])}{late})"
        )
    if not checked:
        lines.append("not checked against a server: --check measures the error")
    return "\n".join(lines)


def _html(curve: Curve, planned: dict[str, Any], checked: Sequence[dict[str, float]], args: argparse.Namespace) -> str:
    objective: objective_search.Objective = args.slo
    shares = [0.05, 0.15, 0.3, 0.45, 0.6, 0.7, 0.8, 0.87, 0.93, 0.97]
    rates = [share * curve.capacity for share in shares]
    curves = [
        Series(f"p{100 * q:g} simulated", [(r, capacity_model.quantile(curve, r, q, args.seed)) for r in rates], style)
        for q, style in ((0.5, "s0 dots"), (objective.q, "s0"))
    ]
    if checked:
        curves.append(Series("measured", [(p["rate"], p["measured_seconds"]) for p in checked], "s1"))
    x = charts.linear("requests/s on one core", rates, charts.number)
    y = charts.logarithmic(
        "latency", [v for one in curves for _, v in one.points] + [objective.seconds], charts.duration
    )
    guides = [charts.Guide(objective.seconds, str(objective))]
    one = charts.lines("One core: latency against load", x, y, curves, guides, "core")
    loads = [10.0 ** (n / 2) for n in range(4, 15)]
    series = []
    for place, factor in enumerate((1.0, 0.5, 2.0)):
        seconds = objective.seconds * factor
        most = capacity_model.highest_rate(curve, objective.q, seconds, args.seed)
        if most:
            name = f"p{100 * objective.q:g} ≤ {ms(seconds)}"
            series.append(Series(name, [(load, math.ceil(load / most)) for load in loads], f"s{place}"))
    least = Series("at the capacity", [(load, math.ceil(load / curve.capacity)) for load in loads], "soft dots", False)
    x = charts.logarithmic("requests/s in all", [loads[0], MOST], charts.number)
    y = charts.logarithmic("cores", [v for s in (*series, least) for _, v in s.points], charts.number)
    many = charts.lines(f"Cores against load, to {charts.number(MOST)}/s", x, y, [*series, least], [], "cores")
    tiles = [(f"{planned['cores']:,}", "cores"), (f"{planned['pods']:,}", "pods")]
    tiles += [
        (f"{planned['rate_per_core']:,.0f}/s", "on each core at most"),
        (f"{planned['load_of_a_core']:.0%}", "load"),
    ]
    text = _text(curve, planned, checked, objective).splitlines()
    return page.page(
        f"Plan: {curve.model}, {planned['rate']:,.0f} requests/s",
        f"{objective}; simulated from what was measured on one core",
        [page.tiles("o0", tiles), page.plots(one, many), page.section("In words", *map(page.text, text))],
    )
