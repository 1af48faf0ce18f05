"""What the runtime makes of a network: which nodes run as one, and that every node and its time is accounted for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper
from tests.unit.insight.made import chain, network, odd, rows, save, weights

from forwardpass.errors import InsightError
from forwardpass.insight import ort_profile
from forwardpass.model import onnx_graph


def test_a_product_and_its_activation_run_as_one(tmp_path: Path) -> None:
    found = onnx_graph.build(chain(4, 8, 8, 3), 6)
    executed = ort_profile.execute(found, save(chain(4, 8, 8, 3), tmp_path), {"x": rows(6)}, 0.01)
    assert [(step.op, step.covers) for step in executed.steps] == [
        ("FusedGemm", ("linear_1", "activation_1")),
        ("FusedGemm", ("linear_2", "activation_2")),
        ("Gemm", ("linear_3",)),
    ]
    assert executed.folded == ()


@pytest.mark.parametrize("named", [True, False])
def test_every_node_has_its_time(tmp_path: Path, named: bool) -> None:
    model = chain(8, 64, 256, 64, 2, activation="Gelu", named=named)
    found = onnx_graph.build(model, 64)
    executed = ort_profile.execute(found, save(model, tmp_path), {"x": rows(64, 8)}, 0.01)
    assert [step.op for step in executed.steps] == ["Gemm", "Gelu"] * 3 + ["Gemm"]
    assert len({step.name for step in executed.steps}) == 7
    assert all(step.microseconds > 0 for step in executed.steps)
    assert executed.node_microseconds == pytest.approx(sum(step.microseconds for step in executed.steps))
    assert executed.runs >= 1 and executed.run_microseconds > 0


def test_every_node_is_run_or_folded_once(tmp_path: Path) -> None:
    found = onnx_graph.build(odd(), 6)
    executed = ort_profile.execute(found, save(odd(), tmp_path), {"x": rows(6)}, 0.01)
    covered = [name for step in executed.steps for name in step.covers]
    assert sorted([*covered, *executed.folded]) == sorted(node.name for node in found.nodes)
    assert executed.folded == ("weights_computed",)


def test_tensors_in_between_are_given_out() -> None:
    found = onnx_graph.build(chain(4, 8, 3), 5)
    x = rows(5)
    got = ort_profile.tensors(found, ["g1", "h1", "y"], {"x": x})
    assert list(got) == ["g1", "h1", "y"]
    np.testing.assert_array_equal(got["g1"], np.maximum(got["h1"], 0))
    assert [output.name for output in found.model.graph.output] == ["y"]  # the graph itself is as it was


def test_rows_are_those_of_the_contract_or_drawn(digits_repository: Path) -> None:
    from forwardpass.model.contract import Contract

    version = digits_repository / "digits" / "1"
    contract = Contract.load(version / "contract.json")
    found = onnx_graph.open_graph(version / "model.onnx", 20)
    drawn = ort_profile.example_rows(found, None)["x"]
    given = ort_profile.example_rows(found, contract)["x"]
    assert drawn.shape == given.shape == (20, 64)
    assert drawn.dtype == given.dtype == np.float32
    np.testing.assert_array_equal(given[:8], contract.input_arrays()["x"])
    np.testing.assert_array_equal(given[8:16], given[:8])


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    found = onnx_graph.build(chain(4, 3), 2)
    with pytest.raises(InsightError, match=r"cannot be run on x float32\[2, 9\]: .*expected: 4|Expected: 4"):
        ort_profile.tensors(found, ["y"], {"x": rows(2, 9)})
    model = network([helper.make_node("Secret", ["x"], ["y"], domain="nobody.knows")], {"W": weights(1)})
    model.opset_import.append(helper.make_opsetid("nobody.knows", 1))
    with pytest.raises(InsightError, match="ONNX Runtime cannot open the network"):
        ort_profile.execute(onnx_graph.build(model, 1), save(model, tmp_path), {"x": rows(1)})
