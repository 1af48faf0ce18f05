"""Where a run is made: by whoever received its requests, up to a length that depends on the cores there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.repository.session_pool import INLINE, INLINE_ON_ONE_CORE, inline_run_limit
from forwardpass.settings import Settings


@pytest.mark.parametrize(
    ("told", "cores", "limit"),
    [
        (None, 1, INLINE_ON_ONE_CORE),
        (None, 2, INLINE),
        (None, 64, INLINE),
        (0.0, 1, 0.0),
        (0.01, 1, 0.01),
        (0.01, 8, 0.01),
    ],
)
def test_what_is_told_comes_first(told: float | None, cores: int, limit: float, tmp_path: Path) -> None:
    settings = Settings(repository=tmp_path, inline_run_limit=told)
    assert inline_run_limit(settings, CpuBudget(cores, "")) == limit
