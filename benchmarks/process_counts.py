"""What several processes behind one port give: requests a second and CPU a request of 1, 2 and 4, on the same cores.

    python benchmarks/process_counts.py [--seconds 3] [--rounds 3] [--cores 2] [--keep]

The server and the generator share all cores, as nothing can be kept free for the generator where every core serves.
What the generator took is known, and what it left to the server is what requests a second are held against. The numbers
of processes take turns within a round; of every figure the median over rounds counts.

Verdict, for two processes: CPU a request at most 1.15 times that of one; requests a second at least 85 % of what the
left CPU gives at one process's CPU a request, and never less than one process gives; no answer wrong, none lost. Exit
status: 0 when that holds; 1 otherwise; 2 when it cannot be run here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import measure
import served
import traffic
from bench import IDENTICAL, REAL
from h2load import Load
from harness import BenchmarkError, Cores
from measure import Scenario, Times

COUNTS = (1, 2, 4)
LOAD = Load(8, 16)
SCENARIOS = (
    Scenario("digits", IDENTICAL, LOAD),
    Scenario("digits", REAL, LOAD),
    Scenario("mnist", REAL, LOAD, repository="mnist", models=("mnist",)),
    Scenario("big", REAL, LOAD, repository="big", models=("big",)),
)
REQUESTS = {"big": 256}
MOST_CPU, LEAST_OF_LEFT = 1.15, 0.85

Figures = dict[str, Any]


def a_round(folder: Path, program: Path, requests: dict[str, Path], cores: list[int], seconds: float) -> Figures:
    """Every scenario at every number of processes: {scenario: {count: figures}}."""
    found: Figures = {scenario.name: {} for scenario in SCENARIOS}
    times = Times(warm_up=1.5, window=seconds)
    for repository in dict.fromkeys(scenario.repository for scenario in SCENARIOS):
        for count in COUNTS:
            with harness.serve(folder / repository, cores, "--processes", str(count)) as server:
                for scenario in SCENARIOS:
                    if scenario.repository == repository:
                        figures = measure.measure(server, scenario, program, requests[scenario.name], cores[0], times)
                        found[scenario.name][str(count)] = figures
    return found


def table(rounds: list[Figures], cores: int) -> tuple[list[Figures], list[tuple[str, bool]]]:
    """A row for every scenario and number of processes, and the verdicts."""
    rows: list[Figures] = []
    verdicts: list[tuple[str, bool]] = []
    for scenario in SCENARIOS:
        medians: dict[int, dict[str, float]] = {}
        for count in COUNTS:
            found = [a_round[scenario.name][str(count)] for a_round in rounds]
            medians[count] = {
                key: statistics.median(figures[key] for figures in found)
                for key in ("requests_per_second", "cpu_us", "load_share", "p50_us", "p99_us")
            }
            problems = [problem for figures in found for problem in figures["problems"]]
            if problems:
                verdicts.append((f"{scenario.name}, {count}: {problems[0]}", False))
        one = medians[1]
        for count, figures in medians.items():
            left = (cores - figures["load_share"]) / one["cpu_us"] * 1e6
            ratios = {
                "cpu_ratio": figures["cpu_us"] / one["cpu_us"],
                "of_one": figures["requests_per_second"] / one["requests_per_second"],
                "of_left": figures["requests_per_second"] / left,
            }
            rows.append({"scenario": scenario.name, "processes": count, **figures, **ratios})
            if count == 2:
                name = scenario.name
                verdicts += [
                    (f"{name}: {ratios['cpu_ratio']:.2f} times the CPU a request (at most {MOST_CPU})",
                     ratios["cpu_ratio"] <= MOST_CPU),
                    (f"{name}: {ratios['of_left']:.0%} of what the CPU left over gives (at least {LEAST_OF_LEFT:.0%})",
                     ratios["of_left"] >= LEAST_OF_LEFT),
                    (f"{name}: {ratios['of_one']:.2f} times the requests of one process (at least 1)",
                     ratios["of_one"] >= 1.0),
                ]  # fmt: skip
    return rows, verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement [3]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2, help="that server and generator share [2]")
    parser.add_argument("--keep", action="store_true", help="write the figures to benchmarks/results")
    chosen = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: chosen.cores]
    if len(cores) < 2:
        raise BenchmarkError("this process may use one core only; several processes gain nothing on one")
    os.sched_setaffinity(0, cores)
    program = traffic.build()
    with tempfile.TemporaryDirectory(prefix="processes-") as name:
        folder = Path(name)
        requests = {}
        for repository in dict.fromkeys(scenario.repository for scenario in SCENARIOS):
            served.repository(folder / repository, repository)
        for number, scenario in enumerate(SCENARIOS):
            requests[scenario.name] = path = folder / f"{number}.requests"
            count = REQUESTS.get(scenario.repository, 1024)
            samples = served.samples(folder / scenario.repository, scenario.models, scenario.rows, count)
            traffic.write_requests(path, scenario.models, samples.rows, samples.answers, scenario.mix)
        rounds = []
        for number in range(chosen.rounds):
            print(f"round {number + 1} of {chosen.rounds}", flush=True)
            rounds.append(a_round(folder, program, requests, cores, chosen.seconds))
    rows, verdicts = table(rounds, len(cores))
    print(f"{'scenario':24} {'processes':>9} {'req/s':>8} {'of one':>7} {'CPU us':>8} {'ratio':>6} {'of left':>8} "
          f"{'load':>5} {'p50 ms':>7} {'p99 ms':>7}")  # fmt: skip
    for row in rows:
        print(f"{row['scenario']:24} {row['processes']:>9} {row['requests_per_second']:>8.0f} {row['of_one']:>7.2f} "
              f"{row['cpu_us']:>8.1f} {row['cpu_ratio']:>6.2f} {row['of_left']:>8.0%} {row['load_share']:>5.2f} "
              f"{row['p50_us'] / 1e3:>7.2f} {row['p99_us'] / 1e3:>7.2f}")  # fmt: skip
    figures = {"cores": len(cores), "seconds": chosen.seconds, "rounds": chosen.rounds, "rows": rows}
    return harness.conclude("process_counts", Cores(cores[0], cores[-1]), figures, verdicts, chosen.keep)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        print(f"it cannot be run here: {error}", file=sys.stderr)
        sys.exit(2)
