"""The recipes: they learn what they promise on rows they never saw, export it, and do nothing twice."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas
import pytest

from forwardpass import Client
from forwardpass.model.contract import CONTRACT_FILE, MODEL_FILE, Contract
from forwardpass.testing.server_process import ServerProcess

MODELS = Path(__file__).parents[3] / "models"


def train(name: str, *arguments: object) -> str:
    command = [sys.executable, MODELS / name / "train.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty at first; each recipe's test trains its model into it."""
    return tmp_path_factory.mktemp("repository")


def data_of(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_data", MODELS / name / "data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "features", "labels", "accuracy"),
    [
        pytest.param("document", 5, 3, 0.9, marks=pytest.mark.slow),
        pytest.param("digits", 64, 10, 0.97, marks=pytest.mark.slow),
        pytest.param("mnist", 784, 10, 0.94, marks=pytest.mark.slow),
    ],
)
def test_a_recipe_learns_and_exports(repository: Path, name: str, features: int, labels: int, accuracy: float) -> None:
    said = train(name, "--repository", repository)
    assert "epoch 1/" in said
    assert f"wrote {repository / name / '1'}" in said
    place = repository / name / "1"
    contract = Contract.load(place / CONTRACT_FILE)
    contract.verify_files(place)
    assert [(t.name, t.datatype, t.shape) for t in contract.inputs] == [("x", "FP32", [-1, features])]
    assert [(t.name, t.datatype, t.shape) for t in contract.outputs] == [("logits", "FP32", [-1, labels])]
    data = data_of(name)
    assert contract.outputs[0].labels == data.LABELS
    assert contract.batch_invariant
    assert sorted(path.name for path in (repository / name).iterdir()) == ["1", "model.toml", "weights.pt"]
    (learnt, learnt_y), (x, y) = data.training(), data.held_out()
    assert set(y) == set(learnt_y) == set(range(labels))
    assert not {row.tobytes() for row in learnt} & {row.tobytes() for row in x}  # never seen
    assert (x.dtype, x.shape, y.dtype, y.shape) == (np.float32, (len(x), features), np.int64, (len(x),))
    session = onnxruntime.InferenceSession(place / MODEL_FILE, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"x": x})
    assert (logits.argmax(1) == y).mean() >= accuracy
    (four,) = session.run(["logits"], {"x": x[:4]})
    assert four.shape == (4, labels)


@pytest.mark.slow
def test_the_recipe_of_a_table_is_served_to_a_data_frame(repository: Path) -> None:
    said = train("tabular", "--repository", repository)
    assert f"wrote {repository / 'tabular' / '1'}" in said
    contract = Contract.load(repository / "tabular" / "1" / CONTRACT_FILE)
    data = data_of("tabular")
    assert [(t.name, t.datatype, t.shape, t.labels, t.categories) for t in contract.inputs] == [
        ("numbers", "FP32", [-1, 5], data.NUMBERS, None),
        ("cylinders", "INT64", [-1], None, data.CATEGORIES["cylinders"]),
        ("origin", "INT64", [-1], None, data.CATEGORIES["origin"]),
    ]
    assert contract.outputs[0].labels == data.LABELS and contract.batch_invariant
    (_, learnt_y), (_, y) = data.training(), data.held_out()
    assert (len(learnt_y), len(y)) == (294, 98)
    with ServerProcess(repository) as server, Client(server.address) as client:
        answer = client.infer("tabular", pandas.DataFrame(data.table()))
    right = np.mean([top[0].label == data.LABELS[label] for top, label in zip(answer.top(), y, strict=True)])
    assert right >= 0.8


@pytest.mark.slow
def test_a_recipe_trains_once_and_again_what_was_spoilt(repository: Path) -> None:
    folder = repository / "document"
    if not folder.exists():  # where this test runs alone
        train("document", "--repository", repository)
    assert train("document", "--repository", repository) == f"document: {folder / '1'} is up to date\n"
    model = (folder / "1" / MODEL_FILE).read_bytes()
    (folder / "1" / MODEL_FILE).write_bytes(b"spoilt")
    assert f"wrote {folder / '2'}" in train("document", "--repository", repository)
    # Trained again, it is the same network to the last bit.
    assert (folder / "2" / MODEL_FILE).read_bytes() == model


@pytest.mark.parametrize("name", ["document", "digits", "tabular", pytest.param("mnist", marks=pytest.mark.slow)])
def test_the_data_needs_no_torch(name: str) -> None:
    path = str(MODELS / name / "data.py")
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({path!r})['held_out']()\n"
        "assert 'torch' not in sys.modules and 'forwardpass' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
