"""An exporter killed at any moment leaves either the old version or the complete new one; the next one tidies up.

`test_staging` kills at every line of putting a version in place; here a whole export is killed, torch and all.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROCESS = Path(__file__).with_name("export_process.py")
KILLS = 16


@pytest.mark.slow
def test_killing_the_exporter_leaves_the_old_version_or_the_complete_new_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, PROCESS, str(KILLS), tmp_path], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    highest = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(highest) == KILLS
    assert highest == sorted(highest) and (highest[0], highest[-1]) == (1, 2)  # from before the first step to the end
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["1", "2"]  # no leftover of a killed one
