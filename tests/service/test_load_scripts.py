"""The scripts for foreign load generators, run for a moment against a real server where their tools are installed.

What is asserted is that they do what their heads say: requests are made, and are answered; no rates.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forwardpass.testing.server_process import ServerProcess

LOAD = Path(__file__).parents[1] / "load"


def _run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    told = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=told)


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed (Debian: nghttp2-client)")
def test_h2load_makes_calls_that_the_server_answers(server: ServerProcess) -> None:
    done = _run("sh", str(LOAD / "h2load.sh"), server.address, "digits", "1", "2", "4", METRICS=server.metrics_url)
    assert done.returncode == 0, done.stderr
    succeeded = re.search(r"(\d+) succeeded, 0 failed, 0 errored, 0 timeout", done.stdout)
    counted = re.search(r"^the server counted: (\d+) OK$", done.stdout, re.MULTILINE)
    assert succeeded and counted, done.stdout
    # What is in flight at the end may be answered on one side only; another test's requests may be counted too.
    assert 0 < int(succeeded[1]) <= int(counted[1]) + 2 * 4


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed (Debian: nghttp2-client)")
def test_h2load_is_not_begun_for_a_model_that_is_not_there(server: ServerProcess) -> None:
    done = _run("sh", str(LOAD / "h2load.sh"), server.address, "nothing", "1")
    assert done.returncode == 1
    assert done.stderr.startswith("h2load.sh: ") and "nothing" in done.stderr
    assert "finished" not in done.stdout


def test_h2loads_script_without_arguments_says_what_it_takes() -> None:
    done = _run("sh", str(LOAD / "h2load.sh"))
    assert done.returncode == 2
    assert "HOST:PORT MODEL" in done.stderr


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed: nothing else here reads JavaScript")
def test_k6s_script_is_javascript(tmp_path: Path) -> None:
    shutil.copy(LOAD / "k6.js", tmp_path / "k6.mjs")  # a module, by its ending
    done = _run("node", "--check", str(tmp_path / "k6.mjs"))
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("k6") is None, reason="k6 is not installed")
def test_k6_makes_calls_that_the_server_answers(server: ServerProcess) -> None:
    words = ["k6", "run", "--no-usage-report", "-e", f"TARGET={server.address}", "-e", "RATE=50", "-e", "SECONDS=2"]
    done = _run(*words, str(LOAD / "k6.js"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"checks_succeeded.*100", done.stdout) or re.search(r"checks.*100", done.stdout), done.stdout
