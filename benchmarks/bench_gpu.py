"""What a batch costs on a CUDA device, beside what it could cost at least: `make bench-gpu`.

    python benchmarks/bench_gpu.py [--quick] [--parts cases memory serving] [--networks ...] [--batches ...]

Needs a CUDA device, PyTorch, ONNX Runtime's CUDA build and numpy; the part `serving` and the column of Forwardpass's
own session need forwardpass too (installed, or server/ on PYTHONPATH). Cases run in processes of their own: one that
fails is shown as such, and the rest goes on. What is there is written after every part, so that a run cut short keeps
it. A full run is kept in benchmarks/results/gpu-DATE.json, any other in benchmarks/out/. Exit status: 0; 1 when
something that is asked is not met or an answer was wrong; 2 when there is no device to be had.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_processes
import gpu_report
from gpu_cases import BATCHES, HOST, MIXED, NETWORKS, PRECISIONS, WAYS, Case, cases

HERE = Path(__file__).resolve().parent
PARTS = ("cases", "memory", "serving")
PATIENCE = 120.0  # seconds that one case may take, with what it takes to open its network
MIXED_CASE = Case("64-256-256-10", 64, "fp32", MIXED)
MIXED_BATCHES = 100_000


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    whole = not args.quick and set(args.parts) == set(PARTS) and set(args.networks) == set(NETWORKS)
    whole = whole and set(args.batches) >= set(BATCHES) and not args.ways
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    path: Path = args.output or HERE / ("results" if whole else "out") / f"gpu-{date}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds, windows = (0.03, 3) if args.quick else (0.1, 7)
    result: dict[str, Any] = {"date": date, "device": {}, "windows": windows, "window_seconds": seconds, "cases": {}}

    def save() -> None:
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")

    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        count = MIXED_BATCHES // 100 if args.quick else MIXED_BATCHES
        worker = [sys.executable, str(HERE / "gpu_worker.py"), folder, str(seconds), str(windows), str(count)]
        if "cases" in args.parts:
            keys = [case.key for case in cases(args.networks, args.batches, args.precisions, args.ways or list(WAYS))]
            result["device"], result["cases"] = gpu_processes.collect(keys, worker, PATIENCE, _tell)
            save()
        if "memory" in args.parts:
            device, found = gpu_processes.collect([MIXED_CASE.key], worker, 5 * PATIENCE, _tell)
            result["device"] = result["device"] or device
            result["memory"] = found[MIXED_CASE.key]
            save()
    if "serving" in args.parts:
        result["serving"] = _serving(2.0 if args.quick else 6.0, args.networks)
        save()
    print(gpu_report.text(result))
    print(f"\nevery figure is in {path}")
    return status(result)


def status(result: dict[str, Any]) -> int:
    """The exit status that a result comes to."""
    if not result["device"] and not any("requests_per_second" in f for f in result.get("serving", {}).values()):
        return 2
    wrong = [line for line in gpu_report.failures(result) if "answers are off" in line]
    missed = [one for one in gpu_report.verdicts(result) if one.verdict != "met"]
    return 1 if wrong or missed else 0


def _serving(seconds: float, networks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Every scenario by itself; one that fails says why."""
    try:
        import gpu_serving  # what it needs may not be there
    except Exception as error:
        return {"all": {"failed": f"{type(error).__name__}: {error}"}}
    found: dict[str, dict[str, Any]] = {}
    for scenario in gpu_serving.SCENARIOS:
        if scenario.network in networks:
            found[scenario.key] = attempt(functools.partial(gpu_serving.measure, scenario, seconds))
            _tell(scenario.key, found[scenario.key])
    return found


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures, or why there are none."""
    try:
        return measure()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _tell(key: str, figures: dict[str, Any]) -> None:
    if figures.get("failed"):
        said = figures["failed"]
    elif "per_second" in figures:
        said = f"{figures['per_second']:.3g}/s"
    elif "seconds" in figures:
        said = f"{min(figures['seconds']) * 1e6:,.1f} µs at best"
    elif "requests_per_second" in figures:
        said = f"{figures['requests_per_second']:,.0f} requests/s"
    else:
        said = f"{figures.get('batches', 0):,} batches, {figures.get('wrong', 0)} of them wrong"
    print(f"{key}: {said}", file=sys.stderr, flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what a batch costs on a CUDA device.")
    parser.add_argument("--quick", action="store_true", help="short windows; a first impression, not a result")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="[all]")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="[all]")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), metavar="ROWS", help="[%(default)s]")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32"], help="[%(default)s]")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help=f"[all]; from host to host: {', '.join(HOST)}")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
