"""From a result of bench.py to tables: on the terminal, and in docs/performance.md.

    python benchmarks/report.py      renders the newest file of benchmarks/results/ into docs/performance.md

Medians over the repeats, with the least and the most; ratios are those of the medians. Needs nothing but the standard
library, so that a test can hold the document to the committed result.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "performance.md"
# Between them report.py writes; {} is the name of the part.
BEGIN, END = "<!-- {}: rendered by benchmarks/report.py -->", "<!-- {}: end -->"

Result = dict[str, Any]

# What each scenario is, in words.
TITLES = {
    "aio-echo": "grpcio aio, echo, no model",
    "native-echo": "pygrpc-native (HTTP/2 in Rust), echo, no model",
    "direct-echo": "direct door, echo, no model",
    "direct-echo-16-rows": "direct door, echo of 16 rows of digits",
    "direct-echo-mnist": "direct door, echo of a row of mnist",
    "digits": "Forwardpass, digits, 1 row",
    "digits-16-rows": "Forwardpass, digits, 16 rows",
    "mnist": "Forwardpass, mnist, 1 row",
    "grpcio-door": "Forwardpass, digits, 1 row, `--transport grpcio`",
}


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some repeats, and their least and most."""

    median: float
    least: float
    most: float

    def text(self, digits: int = 0, factor: float = 1.0) -> str:
        middle, low, high = (f"{v * factor:,.{digits}f}" for v in (self.median, self.least, self.most))
        return middle if low == high else f"{middle} ({low}-{high})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def figure(result: Result, scenario: str, key: str) -> Spread | None:
    """One figure of one scenario; None where it was not measured."""
    values = [repeat[key] for repeat in result["scenarios"].get(scenario, ()) if key in repeat]
    return spread(values) if values else None


def alone(result: Result, model: str, batch: int) -> Spread | None:
    """Microseconds of CPU that ONNX Runtime alone takes for a batch."""
    values = [repeat[str(batch)] for repeat in result["alone"].get(model, ()) if str(batch) in repeat]
    return spread(values) if values else None


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure that is aimed at: at most (or at least) `target`, better `goal`."""

    what: str
    value: float
    target: float
    goal: float | None
    at_most: bool
    digits: int

    def _is_met(self, bound: float) -> bool:
        return self.value <= bound if self.at_most else self.value >= bound

    @property
    def verdict(self) -> str:
        if not self._is_met(self.target):
            return "NOT met"
        if self.goal is None:
            return "met"
        return "met, and the goal" if self._is_met(self.goal) else "met, not the goal"

    @property
    def row(self) -> tuple[str, ...]:
        sign = "≤" if self.at_most else "≥"
        goal = "-" if self.goal is None else f"{sign} {self.goal:.{self.digits}f}"
        return self.what, f"{self.value:.{self.digits}f}", f"{sign} {self.target:.{self.digits}f}", goal, self.verdict


def ratios(result: Result) -> list[Ratio]:
    """The ratios that the figures of this result allow."""
    found: list[Ratio] = []

    def add(
        what: str, above: Spread | None, below: Spread | None, target: float, goal: float | None, share: float = 1.0
    ) -> None:
        if above is not None and below is not None:
            digits = 3 if target < 1 else 2
            found.append(Ratio(what, above.median / (below.median * share), target, goal, True, digits))

    def cpu(scenario: str) -> Spread | None:
        return figure(result, scenario, "cpu_us")

    echo = cpu("aio-echo/4x16")
    add("CPU per request, digits 4x16, to the grpcio aio echo's", cpu("digits/4x16"), echo, 1 / 8, 1 / 13)
    add(
        "CPU per request of 16 rows, to ONNX Runtime's for 16 rows at batch 64",
        cpu("digits-16-rows/4x16"),
        alone(result, "digits", 64),
        2.2,
        1.8,
        16 / 64,
    )
    add(
        "CPU per request, mnist, to ONNX Runtime's for a row at batch 64",
        cpu("mnist/4x16"),
        alone(result, "mnist", 64),
        2.8,
        2.0,
        1 / 64,
    )
    p50 = figure(result, "aio-echo/1x1", "p50_us")
    add("p50 at one stream, to the grpcio aio echo's", figure(result, "digits/1x1", "p50_us"), p50, 0.65, 0.45)
    rows = figure(result, "digits/8x64", "batch_rows")
    if rows is not None:
        found.append(Ratio("mean rows in a batch, digits 8x64", rows.median, 16, None, False, 1))
    checked, wrong = checks(result)
    if checked:
        found.append(Ratio(f"wrong answers, of {checked:,} checked during the load", wrong, 0, None, True, 0))
    return found


def checks(result: Result) -> tuple[int, int]:
    """Answers checked, and how many of them were wrong."""
    repeats = [repeat for found in result["scenarios"].values() for repeat in found if "checked" in repeat]
    return sum(r["checked"] for r in repeats), sum(r["wrong"] for r in repeats)


def problems(result: Result) -> list[str]:
    return [
        f"{name}: {p}" for name, found in result["scenarios"].items() for repeat in found for p in repeat["problems"]
    ]


# -- tables -----------------------------------------------------------------------------------------------------------

SCENARIO_HEAD = ("what answers", "load", "requests/s", "server CPU µs/request", "p50 ms", "p99 ms", "rows/batch")
ALONE_HEAD = ("ONNX Runtime alone", "rows", "CPU µs/run", "CPU µs/row")
RATIO_HEAD = ("ratio", "here", "target", "goal", "")

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def tables(result: Result) -> list[Table]:
    """(head, rows) of each table."""
    scenarios: list[tuple[str, ...]] = []

    def cell(name: str, key: str, digits: int, factor: float = 1.0) -> str:
        found = figure(result, name, key)
        return "-" if found is None else found.text(digits, factor)

    for name in result["scenarios"]:
        title, _, load = name.partition("/")
        scenarios.append(
            (
                TITLES.get(title, title),
                load,
                cell(name, "requests_per_second", 0),
                cell(name, "cpu_us", 1),
                cell(name, "p50_us", 3, 1e-3),
                cell(name, "p99_us", 3, 1e-3),
                cell(name, "batch_rows", 1),
            )
        )
    runtime: list[tuple[str, ...]] = []
    for model, repeats in result["alone"].items():
        for batch in repeats[0] if repeats else ():
            found = alone(result, model, int(batch))
            assert found is not None
            runtime.append((model, batch, found.text(1), found.text(2, 1 / int(batch))))
    met = [ratio.row for ratio in ratios(result)]
    return [
        (head, rows) for head, rows in ((SCENARIO_HEAD, scenarios), (ALONE_HEAD, runtime), (RATIO_HEAD, met)) if rows
    ]


def heading(result: Result) -> str:
    """What it was measured on, in a sentence or two."""
    its = result["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in its["packages"].items())
    apart = "" if result["apart"] else " SERVER AND LOAD SHARED ONE CORE: these figures mean nothing."
    return (
        f"Measured on {result['date']}: {its['cpu']}, {its['cores']} cores, Linux {its['kernel']}, Python "
        f"{its['python']}, h2load {its['h2load']}; {packages}. Server on core {its['server_core']}, load on core "
        f"{its['load_core']}. Medians of {result['repeats']} rounds (least-most).{apart}"
    )


def text(result: Result) -> str:
    """For a terminal: columns aligned."""
    return "\n\n".join([heading(result), *(aligned(head, rows) for head, rows in tables(result))])


def markdown(result: Result | None) -> str:
    """For the document."""
    if result is None:
        return "No run has been recorded yet."
    return "\n\n".join([heading(result), *(piped(head, rows) for head, rows in tables(result))])


def aligned(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: tuple[str, ...]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, rows)])


def piped(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(row) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


# -- the longer checks ------------------------------------------------------------------------------------------------

CHECKS = ("soak", "deadlines", "killed_client")  # each writes NAME.json
CHECK_HEAD = ("check", "what was found (what is asked)", "")


def checks_markdown(folder: Path = HERE / "results") -> str:
    """The recorded verdicts of the longer checks, for the document."""
    rows: list[tuple[str, ...]] = []
    for name in CHECKS:
        path = folder / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text("utf-8"))
            for verdict in result["verdicts"]:
                holds = "holds" if verdict["holds"] else "does NOT hold"
                rows.append((f"`{name}.py`, {result['date']}", verdict["what"], holds))
    return piped(CHECK_HEAD, rows) if rows else "None has been recorded yet."


# -- the document -----------------------------------------------------------------------------------------------------


def newest(folder: Path = HERE / "results") -> Result | None:
    """The newest committed result, by the date in its name."""
    paths = sorted(folder.glob("[0-9]*.json"))
    if not paths:
        return None
    found: Result = json.loads(paths[-1].read_text("utf-8"))
    return found


def rendered(document: str, result: str, checks: str) -> str:
    """The document with what stands between its markers replaced. Raises ValueError where a marker is missing."""
    for name, table in (("result", result), ("checks", checks)):
        begin, end = BEGIN.format(name), END.format(name)
        if document.count(begin) != 1 or document.count(end) != 1:
            raise ValueError(f"expected one {begin!r} and one {end!r} after it")
        before, _, rest = document.partition(begin)
        _, _, after = rest.partition(end)
        document = f"{before}{begin}\n\n{table}\n\n{end}{after}"
    return document


def main() -> int:
    DOCS.write_text(rendered(DOCS.read_text("utf-8"), markdown(newest()), checks_markdown()), "utf-8")
    print(f"{DOCS} rendered")
    return 0


if __name__ == "__main__":
    sys.exit(main())
