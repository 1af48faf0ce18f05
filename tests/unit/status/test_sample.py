"""Sample rows: those of the contract, in the shapes that clients send, and made-up ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tests.service import models
from tests.unit.status.conftest import Watched, X

from forwardpass.status import sample as sample_module
from forwardpass.status.sample import sample


def test_rows_of_the_contract_with_what_it_expects(watched: Callable[[], Watched], tmp_path: Path) -> None:
    folder = models.save(tmp_path / "models", "one", models.chain())
    models.add_contract(folder, {"x": X}, True)
    loaded = watched().repository.loaded("one", "")
    for row in range(4):
        found = json.loads(json.dumps(sample(loaded, row), allow_nan=False))
        assert found["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": X[row % 2].tolist()}]
        assert loaded.contract is not None
        np.testing.assert_array_equal(
            found["expected"]["y"], loaded.contract.expected_arrays()["y"][row % 2 : row % 2 + 1]
        )


def test_made_up_where_there_is_no_contract(watched: Callable[[], Watched], tmp_path: Path) -> None:
    models.save(tmp_path / "models", "many", models.two_by_two())
    models.save(tmp_path / "models", "text", models.echo(models.STRING))
    repository = watched().repository
    many, text = (sample(repository.loaded(name, ""), 0) for name in ("many", "text"))
    assert [(t["name"], t["shape"], t["datatype"]) for t in many["inputs"]] == [
        ("a", [1, 3], "FP32"),
        ("n", [1, 1], "INT64"),
    ]
    assert many["source"] == "made up" and many["expected"] is None
    assert text["inputs"][0] == {"name": "x", "datatype": "BYTES", "shape": [1, 2], "data": ["a", "a"]}


def test_values_that_json_has_not_are_words(watched: Callable[[], Watched], tmp_path: Path) -> None:
    folder = models.save(tmp_path / "models", "one", models.echo())
    models.add_contract(folder, {"x": np.array([[np.nan, np.inf], [1.5, -np.inf]], np.float32)}, True)
    loaded = watched().repository.loaded("one", "")
    assert json.loads(json.dumps(sample(loaded, 0), allow_nan=False))["inputs"][0]["data"] == ["NaN", "Infinity"]
    assert sample(loaded, 1)["expected"] == {"y": [[1.5, "-Infinity"]]}


def test_a_row_too_large_for_a_form_is_left_out(watched: Callable[[], Watched], tmp_path: Path) -> None:
    models.save(tmp_path / "models", "one", models.echo(shape=("batch", sample_module.MOST_ELEMENTS + 1)))
    assert sample(watched().repository.loaded("one", ""), 0)["inputs"] is None
