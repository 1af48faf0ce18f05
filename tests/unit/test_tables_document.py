"""docs/tables.md: its two programs run as they are printed, and the command's output has the form that is shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from forwardpass.cli.main import main
from forwardpass.testing.server_process import ServerProcess

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "tables.md").read_text("utf-8")
TRAINING, CALLING = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def run(code: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_programs_run_as_they_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(TRAINING, tmp_path)
    with ServerProcess(tmp_path / "models") as server:
        said = run(CALLING.replace("Client()", f"Client({server.address!r})"), tmp_path)
        assert said.count("Ranked(") == 4 and said.index("over 27 mpg") < said.index("under 19 mpg")
        frame = re.search(r"DataFrame\(\s*(\{.*\})\s*\)", CALLING)
        assert frame is not None
        columns = {"origin": ["Japan", "USA"], "weight": [1985, 4341], "horsepower": [70, 165], "model_year": [82, 70]}
        assert str(columns).replace("'", '"') == frame[1]
        pandas.DataFrame(columns).to_csv(tmp_path / "cars.csv", index=False)
        arguments = ["predict", "cars", "--input", str(tmp_path / "cars.csv"), "--top", "2", "--server", server.address]
        assert main(arguments) == 0
    shown = re.search(r"--top 2\n(.*?)```", TEXT, re.DOTALL)
    assert shown is not None
    printed = capsys.readouterr().out

    # Training differs in the last places from machine to machine, and so may the digits.
    words = [re.sub(r"\b\d\.\d{4}", "0.0000", text).split() for text in (printed, shown[1])]
    assert words[0] == words[1], printed
