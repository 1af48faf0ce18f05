"""Fitted estimators, exported by the command, served, and answered as their own predict and predict_proba answer."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("skl2onnx", reason="skl2onnx is not installed (the extra estimators)")

import joblib
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from forwardpass import Client
from forwardpass.cli.main import main
from forwardpass.errors import ExportError
from forwardpass.export.estimator import export_estimator
from forwardpass.model.contract import CONTRACT_FILE, Contract
from forwardpass.testing.server_process import ServerProcess

pytestmark = pytest.mark.filterwarnings("ignore")

X, SPECIES = load_iris(return_X_y=True)
X = X.astype(np.float32)
TABLE = pd.DataFrame({"age": [20, 33, 47, 51, 68, 25], "city": ["Bern", "Rome", "Bern", "Oslo", "Rome", "Oslo"]})
TABLE["age"] = TABLE["age"].astype(np.float32)
ANSWERS = ["no", "yes", "no", "yes", "yes", "no"]


def of_a_table() -> Any:
    columns = make_column_transformer((StandardScaler(), ["age"]), (OneHotEncoder(handle_unknown="ignore"), ["city"]))
    return make_pipeline(columns, LogisticRegression()).fit(TABLE, ANSWERS)


def command(*arguments: str | Path) -> int:
    return main(["export", *map(str, arguments)])


def test_estimators_are_served_as_they_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forest = RandomForestClassifier(5, max_depth=4, random_state=0).fit(X, SPECIES)
    ridge = make_pipeline(StandardScaler(), Ridge()).fit(X[:, :3], X[:, 3])
    table = of_a_table()
    repository, samples = tmp_path / "models", tmp_path / "iris.npy"
    np.save(samples, X[::2])
    joblib.dump(forest, tmp_path / "forest.joblib")
    (tmp_path / "ridge.pkl").write_bytes(pickle.dumps(ridge))
    joblib.dump(table, tmp_path / "table.bin")
    (tmp_path / "fitted.py").write_text("import joblib\npipeline = joblib.load('table.bin')\n")
    (tmp_path / "rows.json").write_text(json.dumps({name: [[v] for v in TABLE[name].tolist()] for name in TABLE}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    to = ("--repository", repository)
    assert command("forest.joblib", "--name", "forest", *to) == 1
    assert "add --unsafe-pickle" in capsys.readouterr().err
    given = ("--unsafe-pickle", "--samples", samples)
    assert command("forest.joblib", "--name", "forest", "--labels", "a,b,c", *given, *to) == 1
    assert "--labels: not for an estimator" in capsys.readouterr().err
    assert command("forest.joblib", "--name", "forest", *given, *to) == 0, capsys.readouterr().err
    assert command("ridge.pkl", "--name", "ridge", "--unsafe-pickle", *to) == 0, capsys.readouterr().err
    inputs = ("--input", "age:float32[batch,1]", "--input", "city:text[batch,1]", "--samples", "rows.json")
    assert command("fitted.py:pipeline", "--name", "table", *inputs, *to) == 0, capsys.readouterr().err
    with ServerProcess(repository) as server, Client(server.address) as client:
        found = client.infer("forest", {"x": X})
        assert (found["label"] == forest.predict(X)).all()
        np.testing.assert_allclose(found["probabilities"], forest.predict_proba(X), atol=1e-5)
        assert client.metadata("forest").parameters["batch_invariance"] in ("exact", "rounding")
        np.testing.assert_allclose(client.predict("ridge", X[:, :3])[:, 0], ridge.predict(X[:, :3]), rtol=1e-4)
        asked = pd.DataFrame({"age": np.array([30, 60], np.float32), "city": ["Oslo", "Paris"]})
        found = client.infer("table", {name: asked[name].to_numpy()[:, None] for name in asked})
        assert [str(label) for label in found["label"]] == list(table.predict(asked))
        whole = client.infer("table", asked)  # the frame itself, of which city is text and age a number
        assert (whole["probabilities"] == found["probabilities"]).all()
        assert [row[0].label for row in whole.top()] == list(table.predict(asked))
        assert client.metadata("table").labels("probabilities") == ("no", "yes")
        np.testing.assert_allclose(found["probabilities"], table.predict_proba(asked), atol=1e-5)


@pytest.mark.slow
def test_a_matrix_keeps_the_names_of_the_frame_that_the_estimator_was_fitted_on(tmp_path: Path) -> None:
    frame = pd.DataFrame(X, columns=["sepal length", "sepal width", "petal length", "petal width"])
    fitted = LogisticRegression(max_iter=500).fit(frame, SPECIES)
    exported = export_estimator(fitted, "m", tmp_path, inputs=["x:float32[batch,4]"], samples={"x": X})
    assert exported.contract.inputs[0].labels == list(frame)
    with ServerProcess(tmp_path) as server, Client(server.address) as client:
        turned = frame[["petal width", "petal length", "sepal width", "sepal length"]]
        assert (client.predict("m", turned, output="label") == fitted.predict(frame)).all()


@pytest.mark.parametrize("package", ["lightgbm", "xgboost"])
def test_boosted_trees_are_exported(tmp_path: Path, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    module = importlib.import_module(package)
    quiet = {"verbose": -1} if package == "lightgbm" else {}
    kind = "LGBM" if package == "lightgbm" else "XGB"
    for name, outputs in (("Classifier", ["label", "probabilities"]), ("Regressor", ["prediction"])):
        fitted = getattr(module, kind + name)(n_estimators=4, n_jobs=1, **quiet).fit(X, SPECIES)
        exported = export_estimator(fitted, name, tmp_path, samples={"x": X})
        contract = Contract.load(exported.path / CONTRACT_FILE)
        assert [tensor.name for tensor in contract.outputs] == outputs
        assert contract.rows_independent and contract.torch.startswith(f"none: {kind}")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"fitted on a table: give each of its columns \(age, city\) as an input"):
        export_estimator(of_a_table(), "m", tmp_path)
    with pytest.raises(ExportError, match="text cannot be drawn at random, and city is text: give rows"):
        export_estimator(of_a_table(), "m", tmp_path, inputs=["age:float32[batch,1]", "city:text[batch,1]"])
    with pytest.raises(ExportError, match="has no number of features: expected a fitted one"):
        export_estimator(Ridge(), "m", tmp_path)
    assert not (tmp_path / "m").exists()
