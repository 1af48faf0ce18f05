"""`forwardpass export` as a user types it: from a Python file and its weights to a version, or to a reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from forwardpass.batching.admission import Admission
from forwardpass.cli.main import main
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.model.contract import CONTRACT_FILE, MODEL_FILE, Contract
from forwardpass.model.options import ModelConfig
from forwardpass.repository.loader import LoadRequest, load
from forwardpass.settings import Settings

NETWORK = '''
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, hidden=300, activation="relu"):
        super().__init__()
        self.first = nn.Linear(64, hidden)
        self.activation = {"relu": nn.ReLU(), "tanh": nn.Tanh()}[activation]
        self.second = nn.Linear(hidden, 3)

    def forward(self, x):
        return self.second(self.activation(self.first(x)))

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 4)

    def forward(self, x, ids):
        return x + self.table(ids), ids

class Rounds(nn.Module):
    """Answers in steps of 8 in float32, and not in float64."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return (x * self.weight + 1e8) - 1e8

def ready():
    torch.manual_seed(1)
    return Net(hidden=8)
'''


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, also the current one, with net.py and the weights net.pt (Net) and pair.pt (Pair)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command adds the folder of the user's file
    (tmp_path / "net.py").write_text(NETWORK)
    scope: dict[str, type[torch.nn.Module]] = {}
    exec(NETWORK, scope)
    torch.manual_seed(0)
    torch.save(scope["Net"]().state_dict(), "net.pt")
    torch.save(scope["Pair"]().state_dict(), "pair.pt")
    torch.save(scope["Rounds"]().state_dict(), "rounds.pt")
    return tmp_path


NET = ["export", "net.py:Net", "--weights", "net.pt", "--input", "x:float32[batch,64]"]
TO = ["--name", "net", "--repository", "repository"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "forwardpass", *arguments]


def test_a_network_is_exported_and_reported(project: Path) -> None:
    done = subprocess.run(command(*NET, *TO, "--labels", "a,b,c"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "wrote repository/net/1" in done.stdout
    assert "x FP32 [any, 64]" in done.stdout
    assert "output FP32 [any, 3]" in done.stdout
    assert f"{64 * 300 + 300 + 300 * 3 + 3:,}" in done.stdout
    assert "invariant: a row's answer is the same, bit for bit" in done.stdout
    place = project / "repository" / "net" / "1"
    contract = Contract.load(place / CONTRACT_FILE)
    contract.verify_files(place)
    assert contract.outputs[0].labels == ["a", "b", "c"]
    assert f"{contract.largest_difference:.3g} at most" in done.stdout
    weights = torch.load("net.pt", weights_only=True)
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(place / MODEL_FILE).graph.initializer}
    np.testing.assert_array_equal(stored["first.weight"], weights["first.weight"].numpy())


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(project: Path) -> None:
    # A limit on the size of a file, in KiB: the network takes 78, so the write fails half-way.
    line = 'ulimit -f 40; exec "$@"'
    done = subprocess.run(
        ["bash", "-c", line, "-", *command(*NET, *TO)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "model.onnx: cannot be written" in done.stderr
    assert "File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (project / "repository").exists()


@pytest.mark.slow
def test_two_exporters_at_once_get_two_versions(project: Path) -> None:
    both = [subprocess.Popen(command(*NET, *TO), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(text.splitlines()[0] for text in said) == ["wrote repository/net/1", "wrote repository/net/2"]
    assert sorted(path.name for path in (project / "repository" / "net").iterdir()) == ["1", "2"]
    for number in (1, 2):
        place = project / "repository" / "net" / str(number)
        contract = Contract.load(place / CONTRACT_FILE)
        contract.verify_files(place)
        assert contract.version == number


@pytest.mark.parametrize(
    "given", [["--args", '{"hidden": 8, "activation": "tanh"}'], ["--arg", "hidden=8", "--arg", "activation=tanh"]]
)
@pytest.mark.slow
def test_arguments_of_the_constructor(project: Path, given: list[str]) -> None:
    scope: dict[str, type[torch.nn.Module]] = {}
    exec(NETWORK, scope)
    torch.save(scope["Net"](hidden=8).state_dict(), "net.pt")
    assert main([*NET, *TO, *given]) == 0
    graph = onnx.load("repository/net/1/model.onnx").graph
    assert "Tanh" in [node.op_type for node in graph.node]
    assert [list(i.dims) for i in graph.initializer if i.name == "first.weight"] == [[8, 64]]


def test_several_inputs_outputs_labels_and_options(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "words.txt").write_text("north\neast\nsouth\nwest\n")
    given = ["export", "net.py:Pair", "--weights", "pair.pt", "--input", "x:float32[n,4]", "--input", "ids:int64[n]"]
    given += ["--output", "sum", "--output", "echo", "--labels", "sum=words.txt", "--opset", "18", "--version", "5"]
    assert main([*given, *TO, "--rtol", "1e-3", "--atol", "1e-3"]) == 0
    contract = Contract.load(project / "repository" / "net" / "5" / CONTRACT_FILE)
    assert [(t.name, t.labels) for t in contract.outputs] == [
        ("sum", ["north", "east", "south", "west"]),
        ("echo", None),
    ]
    assert (contract.opset, contract.tolerance.rtol, contract.tolerance.atol) == (18, 1e-3, 1e-3)
    assert "x FP32 [any, 4], ids INT64 [any]" in capsys.readouterr().out


def test_half_precision_is_reported_and_recorded(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*NET, *TO, "--precision", "fp16"]) == 0
    said = capsys.readouterr().out
    assert "fp16 from the first product on; inputs and outputs float32" in said
    place = project / "repository" / "net" / "1"
    contract = Contract.load(place / CONTRACT_FILE)
    assert contract.precision == "fp16"
    assert f"allowed: {contract.tolerance.atol:g} + {contract.tolerance.rtol:g}" in said
    # It serves like any other; on a CPU, too.
    loaded = load(
        LoadRequest("net", "1", place, ModelConfig(), Settings(), CpuBudget(1, "for a test"), Admission(1, 1))
    )
    assert loaded.batches
    assert "contract of 8 rows holds" in loaded.why


def test_a_function_that_makes_a_network_needs_no_weights(project: Path) -> None:
    assert main(["export", "net.py:ready", "--input", "x:float32[batch,64]", *TO]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["net.py:Net", "--input", "x:float32[b,64]"], ["is a class", "--weights"]),
        (
            ["net.py:Net", "--weights", "pair.pt", "--input", "x:float32[b,64]"],
            ["missing: first.weight", "table.weight"],
        ),
        (
            ["net.py:Net", "--weights", "none.pt", "--input", "x:float32[b,64]"],
            ["none.pt: cannot be read: No such file"],
        ),
        (["net.py:Net", "--weights", "net.py", "--input", "x:float32[b,64]"], ["net.py: "]),
        (["net.py:Net", "--weights", "net.pt", "--input", "x:float32[b,65]"], ["64x65", "Net.forward failed"]),
        (["net.py:Net", "--weights", "net.pt", "--input", "x"], ["NAME:DTYPE[DIM,...]"]),
        (["net.py:Gone", "--input", "x:float32[b,64]"], ["no class, function or network 'Gone'"]),
        (["net.py", "--input", "x:float32[b,64]"], ["FILE.py:NAME"]),
        (["net.py:ready", "--input", "x:float32[b,64]", "--args", "[1]"], ["--args '[1]'", "JSON object"]),
        (["net.py:ready", "--input", "x:float32[b,64]", "--args", "{"], ["--args '{'", "is not JSON"]),
        (["net.py:ready", "--input", "x:float32[b,64]", "--arg", "hidden"], ["--arg 'hidden'", "KEY=VALUE"]),
        (["net.py:ready", "--input", "x:float32[b,64]", "--labels", "a,b"], ["2 labels for 3 places"]),
        (["net.py:ready", "--input", "x:float32[b,64]", "--labels", "a", "--labels", "b"], ["OUTPUT=LABELS"]),
        (["net.py:ready", "--input", "x:float32[b,64]", "--rtol", "1e-3"], ["both or neither"]),
        (["net.py:ready", "--input", "x:float32[b,64]", "--rtol", "-1", "--atol", "0"], ["--rtol -1.0"]),
        (["net.py:ready", "--input", "x:float32[b,64]", "--output", "a", "--output", "b"], ["1 outputs; got 2"]),
        (
            ["net.py:Rounds", "--weights", "rounds.pt", "--input", "x:float32[b,2]"],
            ["answers differently", "'output' at [0, ", "allowed"],
        ),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_line_and_leaves_nothing(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: list[str]
) -> None:
    assert main(["export", *arguments, *TO]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("forwardpass export: ")
    assert len(err.splitlines()) == 1
    for part in says:
        assert part in err
    assert not (project / "repository").exists()
