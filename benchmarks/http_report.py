"""The table of docs/performance.md for a recorded result of http_cost.py. Needs nothing but the standard library."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
HEAD = ("what is sent", "requests/s", "server CPU µs/request", "MLServer's", "ratio")


def markdown(folder: Path = RESULTS) -> str:
    """What was measured, where, and what of it holds."""
    path = folder / "http_cost.json"
    if not path.exists():
        return "None has been recorded yet."
    result = json.loads(path.read_text("utf-8"))
    machine = result["machine"]
    rows = [HEAD, ("---",) * len(HEAD)]
    for name, case in result["cases"].items():
        theirs = (f"{case['mlserver_cpu_us']:.0f}", f"{case['ratio']:.2f}") if "ratio" in case else ("-", "-")
        rows.append((name, f"{case['requests_per_second']:,.0f}", f"{case['cpu_us']:.0f}", *theirs))
    failed = [verdict["what"] for verdict in result["verdicts"] if not verdict["holds"]]
    return "\n".join(
        [
            f"Measured on {result['date']}: {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, "
            f"{result['against'] or 'nothing beside it'}. Medians of {result['rounds']} rounds by turns, each with its "
            "own ratio.",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
            *(["", *(f"Does NOT hold: {what}." for what in failed)] if failed else []),
        ]
    )
