"""docs/forward-pass.md, run: every command and every program in it, in order, as a reader would, on trained networks.

What the page shows of their output is compared where it is no time and no accuracy; every picture it has is there.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "forward-pass.md"
_BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Of what the page shows, the lines that are the same on every machine.
SAME_EVERYWHERE = (
    "[4,5] -> [4,10] -> [4,10] -> [4,3]",
    "(x, z1, a1, z2)",
    "fused: Gemm (node_linear) + Relu (node_relu) run as one FusedGemm",
    "against the equations in float64, allowed 1e-05 + 0.0001·|expected|:",
    "digits version 1: 360 rows of 10 classes",
    "probe: logistic regression, 5-fold, every row held out once",
    "digits version 1 on cpu, 1 thread(s)",
    "autograd keeps 2,304 bytes a row for the backward pass, by PyTorch's own count",
)


@dataclass(frozen=True)
class Step:
    """One thing to run, and what the page shows of its output."""

    argv: list[str]
    shown: list[str]


def steps(page: str) -> Iterator[Step]:
    for kind, text in _BLOCK.findall(page):
        if kind == "python":
            yield Step([sys.executable, "-c", text], [])
            continue
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            name, *arguments = shlex.split(command)
            assert name == "forwardpass", f"the page runs {name}, which this test does not know"
            yield Step([sys.executable, "-m", "forwardpass", *arguments], output.splitlines())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, digits_repository: Path, document_repository: Path) -> Path:
    """Where a reader would be: `models/` with the two networks and what they are made from."""
    found = tmp_path_factory.mktemp("reader")
    for repository in (digits_repository, document_repository):
        shutil.copytree(repository, found / "models", dirs_exist_ok=True)
    for name in ("digits", "document"):
        for file in ("data.py", "network.py", "weights.pt"):
            shutil.copy2(ROOT / "models" / name / file, found / "models" / name)
    return found


@pytest.mark.slow
def test_every_command_of_the_page_does_what_it_shows(folder: Path) -> None:
    page = PAGE.read_text("utf-8")
    every = list(steps(page))
    commands = {step.argv[3] for step in every if step.argv[1] == "-m"}
    assert commands == {"trace", "represent", "sweep", "memory", "export"}
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    seen = set()
    for step in every:
        done = subprocess.run(
            step.argv, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", timeout=120
        )
        told = f"{shlex.join(step.argv[2:])}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == 0, told
        lines = done.stdout.splitlines()
        for line in SAME_EVERYWHERE:
            if line in step.shown:
                assert line in lines, f"expected {line!r} of {told}"
                seen.add(line)
        for option in ("--svg", "--png", "--html", "--activations"):
            if option in step.argv:
                written = folder / step.argv[step.argv.index(option) + 1]
                assert written.stat().st_size > 1000, f"{written.name} of {told}"
    assert seen == set(SAME_EVERYWHERE)


def test_every_picture_of_the_page_is_there_and_small() -> None:
    pictures = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", PAGE.read_text("utf-8"))
    assert len(pictures) >= 7
    for _, path in pictures:
        assert 1000 < (PAGE.parent / path).stat().st_size < 300_000, path
