"""What a request costs, on one core, beside what it could cost at least: `make bench`.

    python benchmarks/bench.py [--quick] [--only NAME ...]

Every scenario is run several times in turn (A B C A B C, each round with servers of its own), so that a slow minute
of the machine falls on all alike. Prints medians, the ratios and whether they are met; a full run is kept in
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

import h2load
import harness
import report
from h2load import Load
from harness import BenchmarkError, Cores, Server
from measure import Scenario, Times, measure

# How each server is started, on which core, with which repository; by the name that scenarios know it under.
Starter = Callable[[Path, int], contextlib.AbstractContextManager[Server]]
SERVERS: dict[str, Starter] = {
    "aio-echo": lambda _, core: harness.start([sys.executable, str(harness.HERE / "echo_aio.py")], core),
    "direct-echo": lambda _, core: harness.start([sys.executable, str(harness.HERE / "echo_direct.py")], core),
    "native-echo": lambda _, core: harness.start([sys.executable, str(harness.HERE / "echo_native.py")], core),
    "digits": lambda folder, core: harness.serve(folder / "digits", core),
    "mnist": lambda folder, core: harness.serve(folder / "mnist", core),
    "grpcio-door": lambda folder, core: harness.serve(folder / "digits", core, "--transport", "grpcio"),
}

NARROW, WIDE, ONE = Load(4, 16), Load(8, 64), Load(1, 1)

SCENARIOS = (
    Scenario("aio-echo/4x16", "aio-echo", NARROW, checked=False),
    Scenario("aio-echo/8x64", "aio-echo", WIDE, checked=False),
    Scenario("aio-echo/1x1", "aio-echo", ONE, checked=False),
    Scenario("native-echo/4x16", "native-echo", NARROW, checked=False),
    Scenario("direct-echo/4x16", "direct-echo", NARROW, checked=False),
    Scenario("direct-echo-16-rows/4x16", "direct-echo", NARROW, rows=16, checked=False),
    Scenario("direct-echo-mnist/4x16", "direct-echo", NARROW, model="mnist", checked=False),
    Scenario("direct-echo/8x64", "direct-echo", WIDE, checked=False),
    Scenario("direct-echo/1x1", "direct-echo", ONE, checked=False),
    Scenario("digits/4x16", "digits", NARROW),
    Scenario("digits/8x64", "digits", WIDE),
    Scenario("digits/1x1", "digits", ONE),
    Scenario("digits-16-rows/4x16", "digits", NARROW, rows=16),
    Scenario("mnist/4x16", "mnist", NARROW, model="mnist"),
    Scenario("grpcio-door/4x16", "grpcio-door", NARROW),
)

# ONNX Runtime alone: model, its input width, batches.
ALONE: dict[str, tuple[int, tuple[int, ...]]] = {"digits": (64, (1, 16, 64)), "mnist": (784, (1, 64))}

FULL, QUICK = Times(warm_up=1.5, window=4.0), Times(warm_up=1.0, window=2.0)
REPEATS = 3


def run(
    scenarios: Sequence[Scenario], alone: Sequence[str], repeats: int, times: Times, cores: Cores
) -> dict[str, Any]:
    """All figures, every repeat of them: {"scenarios": {name: [...]}, "alone": {model: [{batch: µs}, ...]}}."""
    measured: dict[str, list[dict[str, Any]]] = {scenario.name: [] for scenario in scenarios}
    runtime: dict[str, list[dict[str, float]]] = {model: [] for model in alone}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        for model in sorted({s.model for s in scenarios if s.checked}):
            harness.repository(folder / model, [model])
        for repeat in range(repeats):
            for model in alone:
                runtime[model].append(_alone(model, cores.server))
            for key in dict.fromkeys(s.server for s in scenarios):
                with SERVERS[key](folder, cores.server) as server:
                    for scenario in scenarios:
                        if scenario.server == key:
                            found = measure(server, scenario, cores.server, times)
                            measured[scenario.name].append(found)
                            _progress(f"{repeat + 1}/{repeats} {scenario.name}", found)
    return {"scenarios": measured, "alone": runtime}


def _alone(model: str, core: int) -> dict[str, float]:
    width, batches = ALONE[model]
    command = [sys.executable, str(harness.HERE / "ort_alone.py"), str(core)]
    command += [str(harness.newest(model) / "model.onnx"), str(width), *map(str, batches)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def _progress(what: str, found: dict[str, Any]) -> None:
    rate, cpu, p50 = found["requests_per_second"], found["cpu_us"], found["p50_us"]
    print(f"{what}: {rate:,.0f}/s, {cpu:.1f} µs CPU, p50 {p50:,.0f} µs", file=sys.stderr, flush=True)
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
        if chosen:
            h2load.require()
        cores = harness.pin(args.shared_core)
        print(f"server on core {cores.server}, load on core {cores.load}", file=sys.stderr, flush=True)
        repeats = args.repeats or (1 if args.quick else REPEATS)
        figures = run(chosen, alone, repeats, QUICK if args.quick else FULL, cores)
    except BenchmarkError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    today = harness.today()
    result = {"date": today, "machine": harness.machine(cores), "repeats": repeats, "apart": cores.apart, **figures}
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
