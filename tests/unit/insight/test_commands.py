"""The commands in this process: what they print, what JSON holds, how they fail. No number of theirs is a time here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.insight.made import chain, odd, rows, save

from forwardpass.cli.main import main
from forwardpass.insight.roofline import Roofs

QUICK = ["--batches", "1,2,8", "--seconds", "0"]


def test_trace_prints_the_shapes_of_the_textbook(document_repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "document", "--batch", "4", "--repository", str(document_repository)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "[4,5] -> [4,10] -> [4,10] -> [4,3]" in lines
    assert "(x, z1, a1, z2)" in lines
    assert "fused: Gemm (node_linear) + Relu (node_relu) run as one FusedGemm" in lines


def read(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, Any]:
    assert main([*command, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_trace_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(odd(), tmp_path)
    np.save(tmp_path / "x.npy", rows(6))
    picture, tensors = tmp_path / "graph.svg", tmp_path / "a.npz"
    options = ["--input", str(tmp_path / "x.npy"), "--svg", str(picture), "--activations", str(tensors)]
    report = read(capsys, "trace", str(path), *options)
    assert report["batch"] == 6
    assert [node["node"] for node in report["nodes"]][:3] == ["centre", "weights_computed", "product"]
    folded = report["nodes"][1]
    assert (folded["runs_as"], folded["microseconds"], folded["flops_batch"]) == ("constant", None, 0)
    assert sum(node["share"] or 0 for node in report["nodes"]) == pytest.approx(1)
    assert report["total"]["parameters"] == 4 + 24 + 6 + 36 + 6 + 6 + 18
    checks = {check["tensor"]: check for check in report["checks"]}
    assert {"a0", "z1", "a1", "z2", "a2", "z3", "z4", "a4", "score", "chances"} == set(checks)
    assert all(check["holds"] and check["largest_difference"] < 1e-5 for check in checks.values())
    assert checks["z1"]["equation"] == "a0 W1ᵀ + b1" and checks["a1"]["equation"] == "Mul ∘ Sigmoid(z1)"
    assert picture.read_text("utf-8").startswith("<svg")
    with np.load(tensors) as saved:
        assert {"x", "a0", "z1", "a1", "z2", "a2"} <= set(saved.files)
        assert saved["a1"].shape == (6, 6)


def test_a_tensor_outside_the_tolerance_fails(
    tmp_path: Path, digits_repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = tmp_path / "digits" / "1"
    shutil.copytree(digits_repository / "digits" / "1", version)
    contract = json.loads((version / "contract.json").read_text())
    contract["tolerance"] = {"rtol": 0.0, "atol": 0.0}  # which no rounding keeps to
    (version / "contract.json").write_text(json.dumps(contract))
    np.save(tmp_path / "x.npy", rows(3, 64))
    assert main(["trace", "digits", "--repository", str(tmp_path), "--input", str(tmp_path / "x.npy")]) == 1
    told = capsys.readouterr()
    assert [line for line in told.out.splitlines() if line.startswith("z1") and line.endswith("DIFFERS")]
    assert "forwardpass trace: z1 (a0 W1ᵀ + b1): output 'z1' at [" in told.err


def test_represent_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = rows(60)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", (x[:, 0] > 0).astype(int))
    command = ["represent", str(save(chain(4, 8, 8, 3), tmp_path))]
    command += ["--data", str(tmp_path / "x.npy"), "--labels", str(tmp_path / "y.npy")]
    report = read(capsys, *command, "--png", str(tmp_path / "p.png"), "--html", str(tmp_path / "p.html"))
    assert [(layer["tensor"], layer["places"]) for layer in report["layers"]] == [
        ("x", 4),
        ("a1", 8),
        ("a2", 8),
        ("z3", 3),
    ]
    assert report["layers"][0]["probe_accuracy"] > 0.85  # the sign of one place is linear in it
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "p.html").read_text("utf-8")


def test_sweep_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", str(save(chain(4, 8, 3), tmp_path)), *QUICK, "--png", str(tmp_path / "s.png")]
    (cpu,) = read(capsys, *command)["providers"]
    assert (cpu["provider"], cpu["threads"]) == ("cpu", 1)
    assert [point["rows"] for point in cpu["points"]] == [1, 2, 8]
    assert cpu["knee_rows"] in (1, 2, 8)
    assert cpu["flops_per_second"] > 1e6
    assert all(point["product_seconds"] > 0 and point["loop_seconds"] > 0 for point in cpu["points"])
    operations = (2 * 4 + 1) * 8 + 8 + (2 * 8 + 1) * 3
    for point in cpu["points"]:
        assert point["compute_roof_seconds"] == pytest.approx(operations * point["rows"] / cpu["flops_per_second"])
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_the_bandwidth_is_that_of_a_copy_of_as_much() -> None:
    found = Roofs(1e9, ((1000, 8e9), (10_000, 4e9), (100_000, 1e9)))
    assert [found.bandwidth(n) for n in (1, 1000, 1001, 10_000, 50_000, 10**9)] == [8e9, 8e9, 4e9, 4e9, 1e9, 1e9]
    assert found.compute_seconds(2e9) == 2.0
    assert found.memory_seconds(500_000) == pytest.approx(5e-4)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (["trace", "model.onnx", "--activations", "a.npz"], "--activations needs --input: the rows to run"),
        (["trace", "model.onnx", "--input", "x.npy", "--batch", "9"], "--batch 9: --input has 3 rows"),
        (["trace", "model.onnx", "--batch", "0"], "a batch of 0 rows: expected at least 1"),
        (["trace", "other"], "there is no model 'other'"),
        (["sweep", "model.onnx", "--provider", "abacus"], "no provider could be measured"),
        (["represent", "model.onnx", "--data", "x.npy", "--labels", "x.npy"], "labels have shape"),
    ],
)
def test_what_is_refused_is_refused_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    save(chain(4, 3), tmp_path)
    np.save("x.npy", rows(3))
    assert main(command) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"forwardpass {command[0]}: ") and problem in last


@pytest.mark.parametrize(
    ("missing", "command", "told"),
    [
        ("onnx", ["trace", "model.onnx"], "forwardpass trace: needs onnx, which is not installed: pip install"),
        ("onnxruntime", ["sweep", "model.onnx"], "forwardpass sweep: onnxruntime is not installed"),
        (
            "sklearn",
            ["represent", "model.onnx", "--data", "x.npy", "--labels", "y.npy"],
            "forwardpass represent: needs sklearn, which is not installed: pip install 'forwardpass[insight]'",
        ),
        ("matplotlib", ["sweep", "model.onnx", "--png", "s.png"], "needs matplotlib, which is not installed"),
    ],
)
def test_a_package_that_is_missing_is_named_in_one_line(
    tmp_path: Path, missing: str, command: list[str], told: str
) -> None:
    save(chain(4, 3), tmp_path)
    np.save(tmp_path / "x.npy", rows(20))
    np.save(tmp_path / "y.npy", np.arange(20) % 2)
    program = f"import sys; sys.modules[{missing!r}] = None; from forwardpass.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *command], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode in (1, 2)
    assert told in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
