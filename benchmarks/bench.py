"""What a request costs, on one core, beside what it could cost at least: `make bench`.

    python benchmarks/bench.py [--quick] [--only NAME ...]

Requests that are all the same, and requests that differ as real clients' do, are measured side by side. Every scenario
is run several times in turn (A B C A B C, each round with servers of its own), so that a slow minute of the machine
falls on all alike. Prints medians, the ratios and whether they are met; a full run is kept in
benchmarks/results/DATE.json, a partial one in benchmarks/out/. Exit status: 0; 1 when an answer was wrong; 2 when it
cannot be run here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import report
import served
import traffic
from h2load import Load
from harness import BenchmarkError, Cores, Server
from measure import Scenario, Times, measure
from traffic import Mix

# How each server is started, on which core, in which folder of repositories; by the name that scenarios know it under.
Starter = Callable[[Path, int], contextlib.AbstractContextManager[Server]]


def _echo(script: str) -> Starter:
    return lambda _, core: harness.start([sys.executable, str(harness.HERE / script)], core)


def _serve(repository: str, *options: str) -> Starter:
    return lambda folder, core: harness.serve(folder / repository, core, *options)


def _serve_tls(folder: Path, core: int) -> contextlib.AbstractContextManager[Server]:
    certificate, key = harness.certificate(folder)
    return harness.serve(folder / "digits", core, "--tls-certificate", str(certificate), "--tls-key", str(key))


SERVERS: dict[str, Starter] = {
    "aio-echo": _echo("echo_aio.py"),
    "native-echo": _echo("echo_native.py"),
    "direct-echo": _echo("echo_direct.py"),
    "digits": _serve("digits"),
    "twelve": _serve("twelve"),
    "mnist": _serve("mnist"),
    "big": _serve("big"),
    "tls": _serve_tls,
    "grpcio-transport": _serve("digits", "--transport", "grpcio"),
}
# The echoes, with the bytes of a message that each sends back at most.
ECHOES = {"aio-echo": 1 << 14, "native-echo": 1 << 14, "direct-echo": 1024}

IDENTICAL = Mix("identical", rows=False)
ROWS = Mix("rows")
GRPCIO = Mix("grpcio", "grpcio")
ID = Mix("id", id=True)
TIMEOUT, TIMEOUT_GRPCIO = Mix("timeout", timeout=True), Mix("timeout-grpcio", "grpcio", timeout=True)
TRACE, TRACE_GRPCIO = Mix("traceparent", traceparent=True), Mix("traceparent-grpcio", "grpcio", traceparent=True)
REAL = Mix("real", id=True, timeout=True, traceparent=True)
REAL_GRPCIO = Mix("real-grpcio", "grpcio", id=True, timeout=True, traceparent=True)
TYPED = Mix("typed", typed=True)
TYPED_REAL = Mix("real-typed", id=True, timeout=True, traceparent=True, typed=True)

NARROW, WIDE, ONE = Load(4, 16), Load(8, 64), Load(1, 1)
HEAVY = Load(8, 16)  # for the large network: two matrices of 64 rows, and no deadline is missed even one row at a time

SCENARIOS = (
    *(Scenario("digits", mix, NARROW) for mix in (REAL, REAL_GRPCIO, TYPED_REAL, IDENTICAL, ROWS, GRPCIO, ID)),
    *(Scenario("digits", mix, NARROW) for mix in (TIMEOUT, TIMEOUT_GRPCIO, TRACE, TRACE_GRPCIO, TYPED)),
    Scenario("twelve", ROWS, NARROW, repository="twelve", models=served.TWELVE),
    *(Scenario("digits", mix, WIDE) for mix in (REAL, IDENTICAL)),
    *(Scenario("digits", mix, ONE) for mix in (REAL, IDENTICAL)),
    *(Scenario("digits-16-rows", mix, NARROW, server="digits", rows=16) for mix in (REAL, IDENTICAL)),
    *(Scenario("tls", mix, NARROW) for mix in (REAL, IDENTICAL)),
    *(Scenario("mnist", m, NARROW, repository="mnist", models=("mnist",)) for m in (REAL, TYPED, IDENTICAL)),
    Scenario("big", REAL, HEAVY, repository="big", models=("big",)),
    *(Scenario("grpcio-transport", mix, NARROW) for mix in (REAL, IDENTICAL)),
    *(Scenario("aio-echo", IDENTICAL, load) for load in (NARROW, WIDE, ONE)),
    Scenario("aio-echo", REAL, NARROW),
    Scenario("native-echo", IDENTICAL, NARROW),
    *(Scenario("direct-echo", mix, NARROW) for mix in (REAL, IDENTICAL)),
)

# ONNX Runtime alone: model, its input width, batches.
ALONE: dict[str, tuple[int, tuple[int, ...]]] = {
    "digits": (64, (1, 16, 64)),
    "mnist": (784, (1, 64)),
    "big": (1024, (16, 64, 256)),
}

FULL, QUICK = Times(warm_up=1.0, window=2.8), Times(warm_up=0.7, window=1.0)
REPEATS = 3
REQUESTS = 1024  # distinct ones; a quarter of them where each is large or costly


def run(
    program: Path, scenarios: Sequence[Scenario], alone: Sequence[str], repeats: int, times: Times, cores: Cores
) -> dict[str, Any]:
    """All figures, every repeat of them: {"scenarios": {name: [...]}, "alone": {model: [{batch: µs}, ...]}}."""
    measured: dict[str, list[dict[str, Any]]] = {scenario.name: [] for scenario in scenarios}
    runtime: dict[str, list[dict[str, float]]] = {model: [] for model in alone}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        for repository in dict.fromkeys([s.repository for s in scenarios] + list(alone)):
            served.repository(folder / repository, repository)
        requests = {scenario: _prepared(folder, i, scenario) for i, scenario in enumerate(scenarios)}
        for repeat in range(repeats):
            for model in alone:
                runtime[model].append(_alone(folder / model, model, cores.server))
            for key in dict.fromkeys(s.started for s in scenarios):
                with SERVERS[key](folder, cores.server) as server:
                    for scenario in scenarios:
                        if scenario.started == key:
                            found = measure(server, scenario, program, requests[scenario], cores.server, times)
                            measured[scenario.name].append(found)
                            _progress(f"{repeat + 1}/{repeats} {scenario.name}", found)
    return {"scenarios": measured, "alone": runtime}


def _prepared(folder: Path, number: int, scenario: Scenario) -> Path:
    """The file of a scenario's requests."""
    path = folder / f"{number}.requests"
    count = REQUESTS // (1 if scenario.rows == 1 and scenario.repository != "big" else 4)
    samples = served.samples(folder / scenario.repository, scenario.models, scenario.rows, count)
    if scenario.started in ECHOES:
        traffic.write_echoes(path, scenario.models[0], samples.rows, ECHOES[scenario.started], scenario.mix)
    else:
        traffic.write_requests(path, scenario.models, samples.rows, samples.answers, scenario.mix)
    return path


def _alone(repository: Path, model: str, core: int) -> dict[str, float]:
    width, batches = ALONE[model]
    command = [sys.executable, str(harness.HERE / "ort_alone.py"), str(core)]
    command += [str(served.model_file(repository, model)), str(width), *map(str, batches)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def _progress(what: str, found: dict[str, Any]) -> None:
    rate, cpu, p50 = found["requests_per_second"], found["cpu_us"], found["p50_us"]
    print(
        f"{what}: {rate:,.0f}/s, {cpu:.1f} µs CPU, p50 {p50:,.0f} µs, load {found['load_share']:.0%} of its core",
        file=sys.stderr,
        flush=True,
    )
    for problem in found["problems"]:
        print(f"{what}: {problem}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what a request costs on one core of this machine.")
    parser.add_argument("--quick", action="store_true", help="one short round; a first impression, not a result")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        default=[],
        help="scenarios by name or by its beginning: " + ", ".join(s.name for s in SCENARIOS) + ", alone",
    )
    parser.add_argument("--repeats", type=int, metavar="N", help=f"rounds (default: {REPEATS}; 1 with --quick)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there")
    parser.add_argument("--shared-core", action="store_true", help="run on a single core, for a trial only")
    args = parser.parse_args(argv)
    chosen = [s for s in SCENARIOS if not args.only or any(s.name.startswith(name) for name in args.only)]
    alone = [model for model in ALONE if not args.only or "alone" in args.only]
    unknown = [n for n in args.only if n != "alone" and not any(s.name.startswith(n) for s in SCENARIOS)]
    if unknown:
        parser.error(f"--only: no scenario begins with {', '.join(unknown)}")
    try:
        program = traffic.build() if chosen else harness.OUT  # ONNX Runtime alone needs no load
        cores = harness.pin(args.shared_core)
        print(f"server on core {cores.server}, load on core {cores.load}", file=sys.stderr, flush=True)
        repeats = args.repeats or (1 if args.quick else REPEATS)
        figures = run(program, chosen, alone, repeats, QUICK if args.quick else FULL, cores)
    except BenchmarkError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    today = harness.today()
    machine = harness.machine(cores) | ({"generator": traffic.version(program)} if chosen else {})
    result = {"date": today, "machine": machine, "repeats": repeats, "apart": cores.apart, **figures}
    print(report.text(result))
    whole = not args.quick and not args.only and repeats >= REPEATS and cores.apart
    path: Path = args.output or (harness.RESULTS if whole else harness.OUT) / f"{today}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"\nevery figure is in {path}")
    problems = report.problems(result)
    for problem in problems:
        print(f"bench: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
