"""From a result of bench.py to tables: on the terminal, in docs/performance.md and in the README.

    python benchmarks/report.py      renders the newest file of benchmarks/results/ into both

Medians over the repeats, with the least and the most; ratios are those of the medians. Needs nothing but the standard
library, so that a test can hold the document to the committed result.
"""

from __future__ import annotations

import json
import statistics
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import http_report
import process_report

HERE = Path(__file__).resolve().parent
DOCS, README = HERE.parent / "docs" / "performance.md", HERE.parent / "README.md"
PROCESSES = DOCS.parent / "processes.md"
# Between them report.py writes; {} is the name of the part.
BEGIN, END = "<!-- {}: rendered by benchmarks/report.py -->", "<!-- {}: end -->"

Result = dict[str, Any]

# What a scenario's name, WHAT/MIX/LOAD, says in words.
TITLES = {
    "digits": "digits, 1 row",
    "digits-16-rows": "digits, 16 rows",
    "twelve": "12 networks of digits' size in turn",
    "tls": "digits, 1 row, TLS",
    "mnist": "mnist, 1 row",
    "big": "1024-4096-4096-1000, 1 row",
    "grpcio-transport": "digits, 1 row, `--transport grpcio`",
    "aio-echo": "grpcio aio, echo, no model",
    "native-echo": "pygrpc-native (HTTP/2 in Rust), echo, no model",
    "direct-echo": "direct transport, echo, no model",
    "direct-echo-16-rows": "direct transport, echo of 16 rows of digits",
    "direct-echo-mnist": "direct transport, echo of a row of mnist",
}
MIXES = {
    "real": "rows, id, deadline, traceparent; as Go and Node send them",
    "real-grpcio": "rows, id, deadline, traceparent; as grpcio sends them",
    "real-typed": "rows, id, deadline, traceparent; typed contents",
    "identical": "nothing",
    "rows": "rows",
    "grpcio": "rows; as grpcio sends them",
    "id": "rows, id",
    "timeout": "rows, deadline",
    "timeout-grpcio": "rows, deadline; as grpcio sends them",
    "traceparent": "rows, traceparent",
    "traceparent-grpcio": "rows, traceparent; as grpcio sends them",
    "typed": "rows; typed contents",
}
ECHO = "aio-echo/identical/4x16"  # what CPU time is held against


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


def best_alone(result: Result, model: str) -> tuple[int, Spread] | None:
    """The batch at which ONNX Runtime alone takes the least CPU a row, and the microseconds of that batch."""
    batches = {int(batch) for repeat in result["alone"].get(model, ()) for batch in repeat}
    found = [(batch, its) for batch in sorted(batches) if (its := alone(result, model, batch)) is not None]
    return min(found, key=lambda pair: pair[1].median / pair[0], default=None)


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

    echo, plain = cpu(ECHO), cpu("digits/identical/4x16")
    real = cpu("digits/real/4x16")
    to_echo = "CPU per request to the grpcio aio echo's"
    add(f"{to_echo}: id, deadline, traceparent differ, indexed", real, echo, 0.11, 0.06)
    add(f"{to_echo}: ids differ", cpu("digits/id/4x16"), echo, 0.06, None)
    add(f"{to_echo}: typed contents", cpu("digits/typed/4x16"), echo, 0.07, None)
    add(f"{to_echo}: 12 models in turn", cpu("twelve/rows/4x16"), echo, 0.07, None)
    add(f"{to_echo}: grpcio's frames", cpu("digits/grpcio/4x16"), echo, 0.06, None)
    add(f"{to_echo}: identical requests", plain, echo, 0.06, None)
    for what, over_tls, over_none in (
        ("identical requests", cpu("tls/identical/4x16"), plain),
        ("requests that differ", cpu("tls/real/4x16"), real),
    ):
        add(f"CPU per request over TLS to plaintext's: {what}", over_tls, over_none, 1.2, None)
    add(
        "CPU per request of 16 rows, to ONNX Runtime's for 16 rows at batch 64: identical requests",
        cpu("digits-16-rows/identical/4x16"), alone(result, "digits", 64), 2.2, 1.8, 16 / 64,
    )  # fmt: skip
    for what, mix, target in (("requests that differ", "real", 3.0), ("identical requests", "identical", 2.8)):
        row = alone(result, "mnist", 64)
        add(
            f"CPU per request, mnist, to ONNX Runtime's for a row at batch 64: {what}",
            cpu(f"mnist/{mix}/4x16"), row, target, 2.0, 1 / 64,
        )  # fmt: skip
    best = best_alone(result, "big")
    add(
        "CPU per request, 1024-4096-4096-1000, to ONNX Runtime's for a row at its best batch",
        cpu("big/real/8x16"), best[1] if best else None, 1.1, None, 1 / best[0] if best else 1.0,
    )  # fmt: skip
    lone, identical = (figure(result, f"digits/{mix}/1x1", "p50_us") for mix in ("real", "identical"))
    add("p50 at one stream, requests that differ to identical ones", lone, identical, 1.3, None)
    p50 = figure(result, "aio-echo/identical/1x1", "p50_us")
    add("p50 at one stream, to the grpcio aio echo's: identical requests", identical, p50, 0.65, 0.45)
    rows = figure(result, "digits/identical/8x64", "batch_rows")
    if rows is not None:
        found.append(Ratio("mean rows in a batch, digits 8x64, identical requests", rows.median, 16, None, False, 1))
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

SCENARIO_HEAD = (
    "what answers",
    "what differs",
    "load",
    "requests/s",
    "server CPU µs/request",
    "to the aio echo of identical requests, 4x16",
    "p50 ms",
    "p99 ms",
    "rows/batch",
    "load generator, of its core",
)
ALONE_HEAD = ("ONNX Runtime alone", "rows", "CPU µs/run", "CPU µs/row")
RATIO_HEAD = ("ratio", "here", "target", "goal", "")

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def tables(result: Result) -> list[Table]:
    """(head, rows) of each table."""
    scenarios: list[tuple[str, ...]] = []

    def cell(name: str, key: str, digits: int, factor: float = 1.0) -> str:
        found = figure(result, name, key)
        return "-" if found is None else found.text(digits, factor)

    echo = figure(result, ECHO, "cpu_us")
    for name in result["scenarios"]:
        what, mix, load = name.split("/")
        cpu, share = figure(result, name, "cpu_us"), figure(result, name, "load_share")
        scenarios.append(
            (
                TITLES.get(what, what),
                MIXES.get(mix, mix),
                load,
                cell(name, "requests_per_second", 0),
                cell(name, "cpu_us", 1),
                f"{cpu.median / echo.median:.3f}" if cpu and echo else "-",
                cell(name, "p50_us", 3, 1e-3),
                cell(name, "p99_us", 3, 1e-3),
                cell(name, "batch_rows", 1),
                f"{share.median:.0%}" if share else "-",
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
    load = its.get("generator") or f"h2load {its['h2load']}"
    apart = "" if result["apart"] else " SERVER AND LOAD SHARED ONE CORE: these figures mean nothing."
    return (
        f"Measured on {result['date']}: {its['cpu']}, {its['cores']} cores, Linux {its['kernel']}, Python "
        f"{its['python']}, load by {load}; {packages}. Server on core {its['server_core']}, load on core "
        f"{its['load_core']}. Medians of {result['repeats']} rounds (least-most).{apart}"
    )


def headline_text(result: Result | None) -> str:
    """The figures that the documents lead with: of requests that differ, and then of identical ones."""
    return "No run has been recorded yet." if result is None else textwrap.fill(_headline(result), 120)


def _headline(result: Result) -> str:
    its = result["machine"]
    where = f"On one core of a virtual machine ({its['cpu']}, {its['cores']} cores; the load on the other)"

    def told(scenario: str) -> str:
        rate, cpu = (figure(result, scenario, key) for key in ("requests_per_second", "cpu_us"))
        return f"{rate.median:,.0f} a second at {cpu.median:.1f} µs of CPU each" if rate and cpu else ""

    def both(mix: str) -> str:
        return f"{told(f'digits/{mix}/4x16')} with 64 in flight, {told(f'digits/{mix}/8x64')} with 512"

    network = "a network of 64-256-256-10 answers single-row requests"
    echo = figure(result, ECHO, "cpu_us")
    beside = (
        f" A gRPC echo in Python with nothing behind it (grpcio's asyncio server) takes {echo.median:.1f} µs in the "
        "same run." if echo else ""
    )  # fmt: skip
    checked, wrong = checks(result)
    right = f" {checked:,} answers were compared with ONNX Runtime's for those rows alone; {wrong} were wrong."
    if not told("digits/real/4x16"):
        return (
            f"{where} {network} that are byte for byte the same: {both('identical')}. That flatters: real requests "
            f"differ, and cost more; no run with such requests has been recorded yet.{beside}{right}"
        )
    return (
        f"{where} {network} that differ as real ones do, in rows, id, deadline and traceparent, as Go and Node send "
        f"them: {both('real')}. As Python's grpcio sends them: {told('digits/real-grpcio/4x16')}. Requests that are "
        f"byte for byte the same, which is what most load generators send: {both('identical')}.{beside}{right}"
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
    # Before requests differed, a scenario was named without what differs.
    found["scenarios"] = {
        name if name.count("/") == 2 else name.replace("/", "/identical/"): its
        for name, its in found["scenarios"].items()
    }
    return found


def rendered(document: str, **parts: str) -> str:
    """The document with what stands between its markers replaced, by the part's name.

    Raises ValueError where a marker is missing.
    """
    for name, table in parts.items():
        begin, end = BEGIN.format(name), END.format(name)
        if document.count(begin) != 1 or document.count(end) != 1:
            raise ValueError(f"expected one {begin!r} and one {end!r} after it")
        before, _, rest = document.partition(begin)
        _, _, after = rest.partition(end)
        document = f"{before}{begin}\n\n{table}\n\n{end}{after}"
    return document


def documents() -> dict[Path, str]:
    """What each document must say, given what is recorded."""
    result = newest()
    headline = headline_text(result)
    small = {"checks": checks_markdown(), "http": http_report.markdown()}
    return {
        DOCS: rendered(DOCS.read_text("utf-8"), headline=headline, result=markdown(result), **small),
        README: rendered(README.read_text("utf-8"), headline=headline),
        PROCESSES: rendered(PROCESSES.read_text("utf-8"), processes=process_report.markdown()),
    }


def main() -> int:
    for path, text in documents().items():
        path.write_text(text, "utf-8")
        print(f"{path} rendered")
    return 0


if __name__ == "__main__":
    sys.exit(main())
