"""docs/getting-started.md, followed word for word: its files, its commands, and what it says comes of them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.publish.publish_modules import ROOT, in_a_clone

from forwardpass.testing.server_process import ServerProcess

TEXT = (ROOT / "docs" / "getting-started.md").read_text("utf-8")
NETWORK, CALLING = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
INSTALL, EXPORT, SERVE, PREDICT, CURL = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
EXPORTED, PREDICTED = re.findall(
    r"```\n([^`]*?)```(?=\n\n)", re.sub(r"```(?:sh|python)\n.*?```", "", TEXT, flags=re.DOTALL)
)


def shell(script: str, folder: Path) -> str:
    """`forwardpass` and `python` are those of this interpreter, whatever is first on the path."""
    python = shlex.quote(sys.executable)
    functions = f'python() {{ {python} "$@"; }}\nforwardpass() {{ {python} -m forwardpass "$@"; }}\n'
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(
        ["bash", "-euc", functions + script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def steady(text: str) -> list[str]:
    """Lines without what may differ in its last places between machines."""
    return [re.sub(r"\d+\.\de-\d+ at most", "so much at most", line).rstrip() for line in text.strip().splitlines()]


@pytest.mark.slow
def test_step_by_step(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NETWORK, "utf-8")
    assert steady(shell(EXPORT, tmp_path)) == steady(EXPORTED)
    assert SERVE == "forwardpass serve models\n"
    with ServerProcess(tmp_path / "models") as server:
        predict = PREDICT.replace("predict net", f"predict net --server {server.address}")
        assert steady(shell(predict, tmp_path)) == steady(PREDICTED)
        (tmp_path / "call.py").write_text(CALLING.replace("127.0.0.1:8001", server.address), "utf-8")
        assert re.fullmatch(r"\[\[(\s*-?\d\.\d+){3}\]\]\n", shell("python call.py", tmp_path))
        answer = shell(CURL.replace("localhost:8000", server.http_url), tmp_path)
        assert answer.startswith('{"predictions":[[')
        assert server.stop() == 0, server.tail()


@in_a_clone
def test_the_install_line_is_readmes() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert INSTALL.strip() == "pip install '.[cpu,train]'" and INSTALL.strip() in readme
