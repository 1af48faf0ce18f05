"""The table that `make test-deploy` ends with: what was run, and the figures that came of it."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from tests.deploy import toolbox

_ROWS: list[tuple[str, str]] = []

Figure = Callable[[str, str], None]


@pytest.fixture
def figure() -> Figure:
    """`figure(what, came)`: one row of the table."""
    return lambda what, came: _ROWS.append((what, came))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not os.environ.get(toolbox.EVERYTHING):
        return
    files: dict[str, dict[str, int]] = {}
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            name = getattr(report, "nodeid", "").partition("::")[0]
            if "tests/deploy" in name and (report.when == "call" or outcome != "passed"):
                counts = files.setdefault(name, {})
                counts[outcome] = counts.get(outcome, 0) + 1
    terminalreporter.section("what was run")
    for name, counts in sorted(files.items()):
        terminalreporter.write_line(f"{name:<40} {', '.join(f'{n} {word}' for word, n in counts.items())}")
    if _ROWS:
        terminalreporter.section("figures")
    wide = max((len(what) for what, _ in _ROWS), default=0)
    for what, came in _ROWS:
        terminalreporter.write_line(f"{what:<{wide}}  {came}")
