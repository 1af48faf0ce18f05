"""`forwardpass predict` and `forwardpass models` as a user types them, against a real server."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from models import ELEMENTS, echo, save, two_by_two

from forwardpass import Client
from forwardpass.cli.main import main
from forwardpass.testing.server_process import ServerProcess

X = np.random.default_rng(0).integers(0, 17, (3, 64)).astype(np.float32)
Said = pytest.CaptureFixture[str]
Serve = Callable[..., ServerProcess]


@pytest.fixture
def logits(server: ServerProcess) -> np.ndarray:
    with Client(server.address) as client:
        return client.predict("digits", X)


def command(server: ServerProcess, *arguments: str) -> int:
    return main([*arguments, "--server", server.address])


def test_a_table_names_the_largest_place(
    server: ServerProcess, logits: np.ndarray, tmp_path: Path, capsys: Said
) -> None:
    np.save(tmp_path / "x.npy", X)
    assert command(server, "predict", "digits", "--input", str(tmp_path / "x.npy"), "--timings") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "digits version 1"
    assert lines[2] == "logits float32 [3, 10]"
    assert lines[3].split() == ["row", "largest", *"0123456789"]
    for number, line in enumerate(lines[4:7]):
        place, label, *values = line.split()
        assert (place, label) == (str(number), str(logits[number].argmax()))
        np.testing.assert_allclose([float(value) for value in values], logits[number], rtol=1e-4)
    assert lines[8].startswith("server: queue ") and "matrix of 3 rows" in lines[8]


def test_every_format_goes_in_and_out(server: ServerProcess, logits: np.ndarray, tmp_path: Path, capsys: Said) -> None:
    np.save(tmp_path / "x.npy", X.astype(np.float64))
    np.savez(tmp_path / "x.npz", x=X)
    np.savetxt(tmp_path / "x.csv", X, delimiter=",", header=",".join(f"pixel {i}" for i in range(64)), comments="")
    (tmp_path / "x.json").write_text(json.dumps(X.tolist()))
    for given in ("x.npy", "x.npz", "x.csv", "x.json"):
        for name in ("", "x="):
            out = tmp_path / "y.npy"
            assert command(server, "predict", "digits", "--input", f"{name}{tmp_path / given}", "--save", str(out)) == 0
            assert np.load(out).tobytes() == logits.tobytes()
            assert f"wrote {out}: logits [3, 10], from digits version 1" in capsys.readouterr().out
            out.unlink()


def test_json_for_programs(
    server: ServerProcess, logits: np.ndarray, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"x": X[0].tolist()})))
    arguments = ["predict", "digits", "--input", "-", "--json", "--timings", "--version", "1", "--output", "logits"]
    assert command(server, *arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["model"], said["version"]) == ("digits", "1")
    assert said["labels"] == {"logits": list("0123456789")}
    assert said["timings"]["batch_rows"] == 1
    assert np.array(said["outputs"]["logits"], np.float32).tobytes() == logits[:1].tobytes()


def test_what_is_served(server: ServerProcess, capsys: Said) -> None:
    assert command(server, "models") == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "VERSION", "STATE", "INPUTS", "->", "OUTPUTS", "BATCHING"]
    assert command(server, "models", "--json") == 0
    (model,) = json.loads(capsys.readouterr().out)
    assert model["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 64]}]
    rows = model["parameters"]["max_batch_size"]
    assert " ".join(line.split()) == f"digits 1 READY x FP32[?,64] -> logits FP32[?,10] up to {rows} rows"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["predict", "digits", "--input", "nowhere.npy"], "predict: nowhere.npy: No such file or directory"),
        (["predict", "nothing", "--input", "x.csv"], "predict: NOT_FOUND: "),
        (["predict", "digits", "--input", "z=x.csv"], "--input z=x.csv: model 'digits' has no input 'z'; expected x"),
        (["predict", "digits", "--input", "x.csv", "--input", "x=x.csv"], "input 'x' is given twice"),
        (["predict", "digits", "--input", "x.csv"], "INVALID_ARGUMENT: input 'x': expected shape [-1,64], got [1,2]"),
        (["predict", "digits", "--input", "x.csv", "--version", "7"], "predict: NOT_FOUND: "),
    ],
)
def test_an_error_is_one_line(
    server: ServerProcess,
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Said,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.csv").write_text("1,2\n")
    assert command(server, *arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("forwardpass predict: ") and said in err


def test_nobody_there_is_one_line_and_a_wrong_timeout_a_usage_error(tmp_path: Path, capsys: Said) -> None:
    assert main(["models", "--server", "127.0.0.1:1"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("forwardpass models: UNAVAILABLE: 127.0.0.1:1: ") and len(err.splitlines()) == 1
    with pytest.raises(SystemExit):
        main(["models", "--timeout", "0"])
    assert "expected more than 0 seconds, got 0" in capsys.readouterr().err


def test_several_inputs_and_outputs_and_texts(tmp_path: Path, serve: Serve, capsys: Said) -> None:
    save(tmp_path / "models", "pair", two_by_two())
    save(tmp_path / "models", "words", echo(ELEMENTS["BYTES"]))
    save(tmp_path / "models", "wide", echo(shape=["batch", 40]))
    save(tmp_path / "models", "alone", echo(shape=[2, 2]))
    (save(tmp_path / "models", "broken", echo()) / "model.onnx").write_bytes(b"")
    server = serve(tmp_path / "models")

    (tmp_path / "a.csv").write_text("p,q,r\n1,2,3\n4,5,6\n")
    (tmp_path / "n.json").write_text("[[10],[20]]")
    pair = ["predict", "pair", "--input", f"a={tmp_path / 'a.csv'}", "--input", f"n={tmp_path / 'n.json'}"]
    assert command(server, *pair, "--json") == 0
    assert json.loads(capsys.readouterr().out)["outputs"] == {
        "sum": [[11, 12, 13], [24, 25, 26]], "most": [3, 6], "n_out": [[10], [20]],
    }  # fmt: skip
    assert command(server, *pair) == 0
    out = capsys.readouterr().out
    assert "sum float32 [2, 3]" in out and "n_out int64 [2, 1]" in out
    assert command(server, *pair, "--save", str(tmp_path / "y.npz")) == 0
    with np.load(tmp_path / "y.npz") as found:
        assert sorted(found.files) == ["most", "n_out", "sum"] and found["most"].tolist() == [3, 6]
    assert command(server, *pair, "--output", "most", "--save", str(tmp_path / "y.csv")) == 0
    assert (tmp_path / "y.csv").read_text().split() == ["most_0", "3.0", "6.0"]
    assert command(server, *pair, "--save", str(tmp_path / "y.npy")) == 1
    assert "holds one output, got sum, most, n_out" in capsys.readouterr().err

    (tmp_path / "w.csv").write_text("grün,blau\n")
    assert command(server, "predict", "words", "--input", str(tmp_path / "w.csv")) == 0
    assert "grün  blau" in capsys.readouterr().out
    np.save(tmp_path / "wide.npy", np.ones((30, 40), np.float32))
    assert command(server, "predict", "wide", "--input", str(tmp_path / "wide.npy")) == 0
    out = capsys.readouterr().out
    assert "… 10 more rows" in out and "…" in out.splitlines()[3]

    assert command(server, "models") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["alone"].endswith("one request at a time")
    assert "a FP32[?,3], n INT64[?,1] -> sum FP32[?,3], most FP32[?], n_out INT64[?,1]" in lines["pair"]
    assert "UNAVAILABLE" in lines["broken"] and lines["broken"].endswith("model.onnx is empty")


def test_as_a_command(server: ServerProcess) -> None:
    line = [
        sys.executable,
        "-m",
        "forwardpass",
        "predict",
        "digits",
        "--server",
        server.address,
        "--input",
        "-",
    ]
    rows = json.dumps([[0] * 64])
    done = subprocess.run(line, input=rows, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "logits float32 [1, 10]" in done.stdout
