"""`forwardpass loadtest`: load any gRPC server that implements the Open Inference Protocol v2, and report the results.

Exit status: 0; 1 when nothing could be measured; 3 when the figures are the client's own limit, not the server's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from forwardpass.console import arguments, connection_options
from forwardpass.errors import LoadTestError
from forwardpass.loadtest import measurement, objective_search, request_bodies
from forwardpass.loadtest.generator.schedule import Phase
from forwardpass.loadtest.measurement import Measurement
from forwardpass.loadtest.objective_search import Knee
from forwardpass.loadtest.target import LoadClient, LoadTarget

SATURATED = 3  # exit status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="HOST:PORT", help="the server's gRPC port")
    parser.add_argument("model", help="the model's name")
    load = parser.add_mutually_exclusive_group(required=True)
    load.add_argument(
        "--rate", type=arguments.rate, metavar="R", help="open loop: R requests/s, whatever has been answered"
    )
    load.add_argument("--steps", type=_rates, metavar="R,R,...", help="open loop at each of these rates in turn")
    load.add_argument("--ramp", type=_ramp, metavar="A:B", help="open loop from A to B requests/s over the duration")
    load.add_argument(
        "--closed", type=arguments.count, metavar="N", help="closed loop: N requests in flight; hides queueing"
    )
    load.add_argument(
        "--slo", type=objective, metavar="p99=10ms", help="search the highest rate that meets this objective"
    )
    parser.add_argument(
        "--duration", type=arguments.seconds, default=10.0, metavar="S", help="seconds, of each rate [10; --slo: 3]"
    )
    parser.add_argument(
        "--warm-up", type=float, default=1.0, metavar="S", help="seconds that are not counted [%(default)s]"
    )
    parser.add_argument(
        "--repeats", type=arguments.count, default=4, metavar="N", help="searches of --slo [%(default)s]"
    )
    parser.add_argument("--arrivals", choices=["poisson", "constant"], default="poisson", help="[%(default)s]")
    parser.add_argument(
        "--deadline",
        type=arguments.duration,
        metavar="50ms",
        help="deadline that requests bring; none is cut short here",
    )
    parser.add_argument(
        "--patience", type=arguments.seconds, default=2.0, metavar="S", help="wait for answers at the end [%(default)s]"
    )
    parser.add_argument("--rows", type=_mix, metavar="N|MIX", help="rows of a request: 8, or 1:70,8:20,64:10 [1]")
    parser.add_argument("--mix", type=Path, metavar="FILE", help="row counts as recorded, one a line, or rows,count")
    parser.add_argument("--input", type=Path, metavar="FILE", help="rows to send: .npy, .npz, .csv, .json [random]")
    parser.add_argument("--model-version", default="", metavar="V", help="[the server's choice]")
    parser.add_argument(
        "--verify", action="store_true", help="each answer must be the bytes that its request got before"
    )
    parser.add_argument("--compare", metavar="HOST:PORT", help="a second server, measured in turns with the first")
    parser.add_argument("--metrics", metavar="URL", help="the server's Prometheus metrics [http://HOST:8002/metrics]")
    parser.add_argument("--compare-metrics", metavar="URL", help="those of the second server")
    parser.add_argument("--names", metavar="A,B", help="what to call the servers in reports [their addresses]")
    parser.add_argument(
        "--processes", type=arguments.count, default=0, metavar="N", help="client processes [by the rate]"
    )
    parser.add_argument(
        "--connections", type=arguments.count, default=8, metavar="N", help="of each process [%(default)s]"
    )
    parser.add_argument("--core", type=int, metavar="N", help="pin the client processes to cores from N on")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and random values [%(default)s]")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page with plots")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a line for each measurement")
    connection_options.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write the reports. Raises LoadTestError or CallError on failure."""
    targets = _targets(args)
    knees: list[Knee] = []
    points: list[Measurement] = []
    if args.slo is not None:
        seconds = min(args.duration, 3.0) if args.duration == 10.0 else args.duration
        for target in targets:
            knee = objective_search.search(_said(target), args.slo, seconds, args.repeats)
            print(describe(knee))
            knees.append(knee)
            points += knee.points
    else:
        points = _loads(args, targets)
        for target in targets:
            own = [point for point in points if point.offer.target == target.name]
            print(f"{target.name}, {target.model}, {target.requests.source}\n{measurement.table(own)}")
    _warn(points if not knees else [knee.confirmed for knee in knees])
    _write(args, points, knees)
    if not any(point.recording.ok for point in points):
        raise LoadTestError("not one request was answered")
    decisive = [knee.confirmed for knee in knees] or points
    return SATURATED if any(point.saturation for point in decisive) or any(k.client_limited for k in knees) else 0


def _targets(args: argparse.Namespace) -> list[LoadTarget]:
    if args.rows and args.mix:
        raise LoadTestError("--rows and --mix both set the rows of a request: give one")
    mix = request_bodies.read_mix(args.mix) if args.mix else args.rows or {1: 1.0}
    client = LoadClient(
        args.arrivals,
        args.connections,
        args.processes,
        args.core,
        args.deadline,
        args.warm_up,
        args.patience,
        args.seed,
        progress=True,
        access=connection_options.access_of(args),
    )
    addresses = [args.target, *([args.compare] if args.compare else [])]
    names = args.names.split(",") if args.names else addresses
    if len(names) != len(addresses) or len(set(names)) != len(names):
        raise LoadTestError(f"--names: expected {len(addresses)} different names, got {args.names or names[0]}")
    model = request_bodies.info(args.target, args.model, args.model_version, client.access)
    requests = request_bodies.make(model, args.model_version, mix, args.input, args.seed)
    urls = [args.metrics, args.compare_metrics]
    return [
        LoadTarget(address, args.model, requests, client, name=name, metrics_url=url, verify=args.verify)
        for address, name, url in zip(addresses, names, urls, strict=False)
    ]


def _loads(args: argparse.Namespace, targets: Sequence[LoadTarget]) -> list[Measurement]:
    """Measure every load on every target, alternating between the targets."""
    points = []
    for rate in args.steps or [args.rate or 0.0]:
        for target in targets:
            if args.closed:
                point = target.closed(args.closed, args.duration)
            elif args.ramp:
                point = target.phases([Phase(args.duration, *args.ramp)])
            else:
                point = target.at_rate(rate, args.duration)
            print(f"{target.name}: {measurement.line(point)}", file=sys.stderr)
            points.append(point)
    return points


def _said(target: LoadTarget) -> objective_search.Measure:
    """The target's open loop, with each probe printed to stderr."""

    def measure(rate: float, seconds: float) -> Measurement:
        point = target.at_rate(rate, seconds)
        print(f"{target.name}: {measurement.line(point)}", file=sys.stderr)
        return point

    return measure


def describe(knee: Knee) -> str:
    """The result of a search, as text."""
    point = knee.confirmed
    text = (
        f"{point.offer.target}: {knee.objective} up to {knee.rate:,.0f} requests/s "
        f"(95 % confidence {knee.low:,.0f} to {knee.high:,.0f}, {len(knee.estimates)} searches, "
        f"{len(knee.points)} probes); confirmed: {measurement.line(point)}"
    )
    if knee.client_limited:
        text += "\nthe client gave out before the server did: these are lower bounds"
    return text


def _warn(points: Sequence[Measurement]) -> None:
    for point in points:
        for why in point.saturation:
            print(f"client saturated at {measurement.line(point)}\n  {why}", file=sys.stderr)
        for outcome, text in point.examples.items():
            print(f"{point.offer.target}: {outcome}, for example: {text}", file=sys.stderr)


def _write(args: argparse.Namespace, points: Sequence[Measurement], knees: Sequence[Knee]) -> None:
    from forwardpass.loadtest.report import load_report

    try:
        if args.json:
            args.json.write_text(load_report.as_json(points, knees), "utf-8")
        if args.csv:
            args.csv.write_text(load_report.as_csv(points), "utf-8")
        if args.report:
            args.report.write_text(load_report.as_html(points, knees), "utf-8")
    except OSError as error:
        raise LoadTestError(f"{error.filename}: {error.strerror}") from None


def _rates(text: str) -> list[float]:
    return [arguments.rate(part) for part in text.split(",")]


def _ramp(text: str) -> tuple[float, float]:
    begin, colon, end = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"expected A:B in requests/s, got {text}")
    return arguments.rate(begin), arguments.rate(end)


def _mix(text: str) -> dict[int, float]:
    try:
        return request_bodies.parse_mix(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def objective(text: str) -> objective_search.Objective:
    try:
        return objective_search.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
