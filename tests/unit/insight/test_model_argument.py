"""Which file a MODEL is, and which rows a file has for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.unit.insight.made import chain, odd, rows, save

from forwardpass.errors import ContractError, ForwardpassError, InsightError
from forwardpass.insight.equation_check import load_rows
from forwardpass.insight.model_argument import TOLERANCE, find
from forwardpass.model import onnx_graph


def test_a_name_is_the_newest_version_in_the_repository(tmp_path: Path, digits_repository: Path) -> None:
    for number in ("9", "10", "1"):
        shutil.copytree(digits_repository / "digits" / "1", tmp_path / "digits" / number)
    (tmp_path / "digits" / "11").mkdir()  # no model in it
    found = find("digits", tmp_path)
    assert (found.name, found.version, found.title) == ("digits", "10", "digits version 10")
    assert found.path == tmp_path / "digits" / "10" / "model.onnx"
    assert found.contract is not None and found.tolerance == found.contract.tolerance


def test_a_path_is_a_model_a_version_or_a_file(tmp_path: Path, digits_repository: Path) -> None:
    folder = digits_repository / "digits"
    assert find(str(folder), tmp_path) == find(str(folder / "1"), tmp_path) == find("digits", digits_repository)
    bare = find(str(save(chain(4, 3), tmp_path, "mine.onnx")), digits_repository)
    assert (bare.name, bare.version, bare.title, bare.contract) == ("mine", "", "mine", None)
    assert bare.tolerance == TOLERANCE


def test_what_is_not_there_is_told_with_what_is(tmp_path: Path, digits_repository: Path) -> None:
    with pytest.raises(InsightError, match=r"there is no model 'digit': .* has digits$"):
        find("digit", digits_repository)
    with pytest.raises(InsightError, match="has no models"):
        find("digits", tmp_path)


def test_a_contract_that_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "mine" / "1").mkdir(parents=True)
    save(chain(4, 3), tmp_path / "mine" / "1")
    (tmp_path / "mine" / "1" / "contract.json").write_text("{")
    with pytest.raises(ContractError, match="is not JSON"):
        find("mine", tmp_path)


def test_rows_come_in_the_networks_dtype(tmp_path: Path) -> None:
    found = onnx_graph.build(chain(4, 3), 1)
    np.save(tmp_path / "x.npy", np.arange(12).reshape(3, 4))
    got = load_rows(tmp_path / "x.npy", found)
    assert list(got) == ["x"] and got["x"].dtype == np.float32 and got["x"].shape == (3, 4)
    np.savetxt(tmp_path / "x.csv", rows(5), delimiter=",", header="a,b,c,d", comments="")
    np.testing.assert_allclose(load_rows(tmp_path / "x.csv", found)["x"], rows(5), rtol=1e-6)


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (rows(3, 5), r"x\.npy: has shape \[3,5\]; expected x FP32\[\?,4\]"),
        (rows(4)[0], r"has shape \[4\]; expected x"),
        (rows(4)[:0], "at least one"),
        (np.full((2, 4), "a"), "expected float32"),
    ],
)
def test_rows_that_do_not_fit(tmp_path: Path, array: np.ndarray, problem: str) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ForwardpassError, match=problem):
        load_rows(tmp_path / "x.npy", onnx_graph.build(odd(), 1))


def test_every_input_needs_its_rows(tmp_path: Path) -> None:
    from onnx import helper
    from tests.unit.insight.made import network

    found = onnx_graph.build(network([helper.make_node("Add", ["x", "w"], ["y"])], {}, inputs=("x", "w")), 1)
    np.savez(tmp_path / "rows.npz", x=rows(3))
    with pytest.raises(InsightError, match="has no rows for the input w"):
        load_rows(tmp_path / "rows.npz", found)
    np.savez(tmp_path / "rows.npz", x=rows(3), w=rows(2))
    with pytest.raises(InsightError, match="as many rows for every input"):
        load_rows(tmp_path / "rows.npz", found)
