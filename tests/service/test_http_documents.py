"""The curl lines of README and docs/http.md, run as they stand but for the server's address."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from forwardpass.testing.server_process import ServerProcess

ROOT = Path(__file__).parents[2]
BLOCKS = [
    pytest.param(block, id=f"{document}-{place}")
    for document in ("README.md", "docs/http.md")
    for place, block in enumerate(re.findall(r"```sh\n(curl .*?)```", (ROOT / document).read_text("utf-8"), re.DOTALL))
]


def test_both_documents_have_some() -> None:
    assert {str(block.id).rpartition("-")[0] for block in BLOCKS} == {"README.md", "docs/http.md"}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_curl_lines_is_answered(server: ServerProcess, block: str) -> None:
    if shutil.which("curl") is None or shutil.which("bash") is None:
        pytest.skip("curl or bash is not installed")
    assert "localhost:8000" in block
    # A line for each response; an error's status ends the script.
    script = "set -e\ncurl() { command curl -sS --noproxy '*' --fail-with-body \"$@\"; echo; }\n"
    script += block.replace("localhost:8000", server.http_url)
    done = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(re.findall("^curl ", block, re.MULTILINE))
    assert all("outputs" in answer or "predictions" in answer for answer in answers)
