"""The table of docs/processes.md for a recorded result of process_counts.py. Needs nothing but the standard library."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
HEAD = (
    "what is sent",
    "processes",
    "requests/s",
    "of one process",
    "server CPU µs/request",
    "of one process",
    "p99 ms",
)
NAMES = {
    "digits/identical/8x16": "`digits`, one request over and over",
    "digits/real/8x16": "`digits`, requests that differ",
    "mnist/real/8x16": "`mnist`, requests that differ",
    "big/real/8x16": "1024-4096-4096-1000, requests that differ",
}


def markdown(folder: Path = RESULTS) -> str:
    """What was measured, where, and what of it holds."""
    path = folder / "process_counts.json"
    if not path.exists():
        return "None has been recorded yet."
    result = json.loads(path.read_text("utf-8"))
    machine = result["machine"]
    rows = [HEAD, ("---",) * len(HEAD)]
    rows += [
        (
            NAMES.get(row["scenario"], row["scenario"]), str(row["processes"]),
            f"{row['requests_per_second']:,.0f}", f"{row['of_one']:.2f}",
            f"{row['cpu_us']:,.1f}", f"{row['cpu_ratio']:.2f}", f"{row['p99_us'] / 1e3:.1f}",
        )
        for row in result["rows"]
    ]  # fmt: skip
    failed = [verdict["what"] for verdict in result["verdicts"] if not verdict["holds"]]
    return "\n".join(
        [
            f"`python benchmarks/process_counts.py`, {result['date']}: {machine['cpu']}, {result['cores']} cores that "
            f"server and load generator share, 8 connections with 16 requests under way each; medians of "
            f"{result['rounds']} rounds.",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
            *(["", *(f"Does NOT hold: {what}." for what in failed)] if failed else []),
        ]
    )
