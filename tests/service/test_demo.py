"""`python models/demo.py`: the whole way; and that it fails when an answer, or the server, is not right."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture
def models(digits_repository: Path, tmp_path: Path) -> Path:
    """`digits` trained and exported, with its recipe beside it, to be spoilt as a test likes."""
    for path in (MODELS / "digits").iterdir():
        if path.is_file():
            (tmp_path / "digits").mkdir(exist_ok=True)
            shutil.copy2(path, tmp_path / "digits")
    shutil.copytree(digits_repository / "digits" / "1", tmp_path / "digits" / "1")
    return tmp_path


def demo(models: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(MODELS / "demo.py"), "--models", str(models), "--calls", "720", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)


def test_the_demo_shows_what_it_promises(models: Path) -> None:
    done = demo(models)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    said = dict(re.findall(r"^  (\S.*?)  +(.*)$", done.stdout, re.MULTILINE))
    assert float(said["accuracy on held-out rows"].rstrip("%")) >= 97
    assert "within the tolerance" in said["largest difference from PyTorch"]
    assert float(said["requests/s"].replace(",", "")) > 0
    p50, p95, p99 = (float(part) for part in said["latency p50 / p95 / p99"].removesuffix(" ms").split(" / "))
    assert 0 < p50 <= p95 <= p99
    assert float(said["mean rows per batch"]) > 1
    assert said["calls"].startswith("720, one row each, 64 in flight")
    assert "720/720" in done.stdout


@pytest.mark.slow
def test_other_weights_than_the_servers_are_found_out(models: Path) -> None:
    weights = torch.load(models / "digits" / "weights.pt", weights_only=True)
    weights["layers.6.bias"] = weights["layers.6.bias"] + torch.tensor([0.0] * 9 + [1e-3])
    torch.save(weights, models / "digits" / "weights.pt")
    done = demo(models)
    assert done.returncode == 1
    assert "BEYOND the tolerance" in done.stdout
    assert re.search(r"answers differ from PyTorch's: output 'logits' at \[\d+, 9\]: expected", done.stderr)


@pytest.mark.slow
def test_a_server_that_cannot_start_is_explained(models: Path) -> None:
    (models / "digits" / "1" / "model.onnx").write_bytes(b"no network")
    done = demo(models)
    assert done.returncode == 1
    assert done.stderr.startswith("demo: the server ended before it was ready:")
    assert "model digits version 1: NOT served: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("weights.pt", "weights.pt is not there: train first, with python "),
        ("data.py", "data.py is not there: run this"),
    ],
)
@pytest.mark.slow
def test_what_is_missing_is_named(models: Path, file: str, said: str) -> None:
    (models / "digits" / file).unlink()
    done = demo(models)
    assert done.returncode == 1
    assert done.stderr.startswith("demo: ") and said in done.stderr
    assert len(done.stderr.splitlines()) == 1
