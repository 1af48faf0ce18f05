"""What network, contract and options agree on, and every way in which they may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.unit.made import signature, tensor

from forwardpass.errors import ConfigError, ContractError
from forwardpass.model import triton_config
from forwardpass.model.contract import Contract, Samples, Tolerance
from forwardpass.model.contract_tensor import ContractTensor
from forwardpass.model.options import ModelConfig, TensorOptions
from forwardpass.model.signature import ModelSignature
from forwardpass.repository.reconcile import reconcile

FOUND = signature(
    (tensor("x", "FP32", -1, 4), tensor("n", "INT64", -1, -1)),
    (tensor("y", "FP32", -1, 3), tensor("a1", "FP32", -1, 8)),
)
WHOLE = signature((tensor("x", "FP32", 2, 4),), (tensor("y", "FP32", 2, 3),), batchable=False)


def options(*tensors: dict[str, Any], outputs: tuple[dict[str, Any], ...] = (), **more: Any) -> ModelConfig:
    return ModelConfig(
        inputs=[TensorOptions(**t) for t in tensors], outputs=[TensorOptions(**t) for t in outputs], **more
    )


def from_text(folder: Path, text: str) -> ModelConfig:
    (folder / "config.pbtxt").write_text(text)
    return triton_config.load(folder / "config.pbtxt", None)


def test_without_options_it_is_as_the_network_has_it(tmp_path: Path) -> None:
    assert reconcile(FOUND, ModelConfig(), None, tmp_path) == FOUND


def test_options_narrow_an_axis_of_any_size(tmp_path: Path) -> None:
    config = options({"name": "n", "dims": [5]}, {"name": "x", "datatype": "FP32"}, max_batch_size=8)
    found = reconcile(FOUND, config, None, tmp_path)
    assert [t.shape for t in found.inputs] == [(-1, 4), (-1, 5)]
    whole = options({"name": "x", "dims": [2, 4]}, max_batch_size=0)
    assert reconcile(WHOLE, whole, None, tmp_path) == WHOLE
    any_rows = options({"name": "x", "dims": [7, 4]}, {"name": "n", "dims": [-1, 5]}, max_batch_size=0)
    assert [t.shape for t in reconcile(FOUND, any_rows, None, tmp_path).inputs] == [(7, 4), (-1, 5)]


def test_clients_may_see_another_shape(tmp_path: Path) -> None:
    reshaped = options({"name": "x", "dims": [2, 2], "reshape": [4]}, {"name": "n"}, max_batch_size=8)
    (x, n) = reconcile(FOUND, reshaped, None, tmp_path).inputs
    assert (x.shape, x.network_shape, n.network_shape) == ((-1, 2, 2), (-1, 4), None)
    scalar = signature((tensor("x", "FP32"),), (tensor("y", "FP32"),), batchable=False)
    (x,) = reconcile(scalar, options({"name": "x", "dims": [1]}, max_batch_size=0), None, tmp_path).inputs
    assert (x.shape, x.network_shape) == ((1,), ())


def test_outputs_that_are_left_out_are_there_for_those_who_ask(tmp_path: Path) -> None:
    found = reconcile(FOUND, options(outputs=({"name": "y"},)), None, tmp_path)
    assert found.hidden == {"a1"} and found.default_outputs == (0,)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"name": "z"}, "model.toml: input 'z': the network has no such input; it has x, n"),
        ({"name": "x", "datatype": "FP64"}, "input 'x': expected datatype FP32, as the network, got FP64"),
        ({"name": "x", "dims": [5]}, "input 'x': expected dims [4] for one row, as the network's, got [5]"),
        ({"name": "x", "dims": [-1]}, "expected dims [4] for one row, as the network's, got [-1]"),
        ({"name": "x", "dims": [-1, 4]}, "expected dims [4] for one row, as the network's, got [-1, 4]"),
        ({"name": "x"}, "inputs: the network's input 'n' is not among them"),
    ],
)
def test_what_does_not_fit_the_network_is_told(tmp_path: Path, told: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        reconcile(FOUND, options(told, max_batch_size=8), None, tmp_path)
    assert reason in str(caught.value)


def test_a_config_pbtxt_is_told_with_the_line(tmp_path: Path) -> None:
    config = from_text(tmp_path, 'max_batch_size: 8\noutput [ {\n name: "y" }, {\n name: "a1" dims: 9 } ]')
    with pytest.raises(ConfigError, match=r"config\.pbtxt:3: output 'a1': expected dims \[8\] for one row"):
        reconcile(FOUND, config, None, tmp_path)
    config = from_text(tmp_path, '\nmax_batch_size: 8\ninput { name: "x" dims: 4 }')
    with pytest.raises(ConfigError, match=r"config\.pbtxt:2: max_batch_size: expected 0, got 8: axis 0 .* 'x' has sh"):
        reconcile(WHOLE, config, None, tmp_path)
    whole = from_text(tmp_path, 'max_batch_size: 0\ninput { name: "x" dims: [ 4, 4 ] }')
    with pytest.raises(ConfigError, match=r"expected dims \[2, 4\], as the network's, got \[4, 4\]"):
        reconcile(WHOLE, whole, None, tmp_path)


def test_labels_come_from_the_file_of_the_output_or_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    (tmp_path / "two.txt").write_text("u\nv")

    def labels(config: ModelConfig) -> list[tuple[str, ...]]:
        return [t.labels for t in reconcile(FOUND, config, None, tmp_path).outputs]

    assert labels(ModelConfig(labels="three.txt")) == [("a", "b", "c"), ()]
    assert labels(options(outputs=({"name": "y", "labels": "two.txt"}, {"name": "a1"}))) == [("u", "v"), ()]
    shown = options(outputs=({"name": "y", "dims": [3, 1], "reshape": [3]}, {"name": "a1"}), labels="three.txt")
    assert labels(shown.model_copy(update={"max_batch_size": 8})) == [(), ()]  # of the last axis that clients see
    with pytest.raises(ConfigError, match=r"labels: .* cannot be read"):
        labels(ModelConfig(labels="none.txt"))
    with pytest.raises(ConfigError, match=r"output 'y': .* cannot be read"):
        labels(options(outputs=({"name": "y", "labels": "none.txt"},)))


def contract(inputs: dict[str, list[int]], outputs: dict[str, list[int]], **more: Any) -> Contract:
    specs = {
        kind: [ContractTensor(name=n, datatype="FP32", shape=s) for n, s in tensors.items()]
        for kind, tensors in (("inputs", inputs), ("outputs", outputs))
    }
    return Contract(
        model="m", version=1, files={}, **specs, batchable=True, batch_invariant=True, opset=17, torch="", source=None,
        onnxruntime="", provider="", tolerance=Tolerance(rtol=0.0, atol=0.0), largest_difference=0.0,
        samples=Samples(rows=1, inputs={n: [[0.0] * s[1]] for n, s in inputs.items()},
                        expected={n: [[0.0] * s[1]] for n, s in outputs.items()}), **more,
    )  # fmt: skip


def test_a_contract_names_hidden_outputs_and_must_name_what_is_there(tmp_path: Path) -> None:
    found = ModelSignature((tensor("x", "FP32", -1, 4),), FOUND.outputs, True)
    hidden = [ContractTensor(name="a1", datatype="FP32", shape=[-1, 8])]
    agreed = reconcile(found, ModelConfig(), contract({"x": [-1, 4]}, {"y": [-1, 3]}, hidden=hidden), tmp_path)
    assert agreed.hidden == {"a1"}
    with pytest.raises(ContractError, match="the contract's outputs are y, the network's are a1, y"):
        reconcile(found, ModelConfig(), contract({"x": [-1, 4]}, {"y": [-1, 3]}), tmp_path)
    with pytest.raises(ContractError, match="the contract's inputs are z, the network's are x"):
        reconcile(found, ModelConfig(), contract({"z": [-1, 4]}, {"y": [-1, 3]}, hidden=hidden), tmp_path)


@pytest.mark.parametrize("there", [[-1, 5], [-1, 4, 1], [3, 4]])
def test_a_contract_has_the_networks_shapes(tmp_path: Path, there: list[int]) -> None:
    found = ModelSignature((tensor("x", "FP32", *there),), (tensor("y", "FP32", -1, 3),), True)
    with pytest.raises(ContractError, match=r"the contract's 'x' is FP32 \[-1, 4\], the network's is FP32 \["):
        reconcile(found, ModelConfig(), contract({"x": [-1, 4]}, {"y": [-1, 3]}), tmp_path)


def test_a_contract_has_the_networks_datatypes(tmp_path: Path) -> None:
    found = ModelSignature(
        (tensor("x", "FP32", -1, 4),), (tensor("y", "FP32", -1, 3), tensor("a1", "FP64", -1, 8)), True
    )
    hidden = [ContractTensor(name="a1", datatype="FP32", shape=[-1, 8])]
    with pytest.raises(ContractError, match=r"the contract's 'a1' is FP32 .*, the network's is FP64"):
        reconcile(found, ModelConfig(), contract({"x": [-1, 4]}, {"y": [-1, 3]}, hidden=hidden), tmp_path)


def test_a_contract_may_narrow_an_axis_of_any_size(tmp_path: Path) -> None:
    found = ModelSignature((tensor("x", "FP32", -1, -1),), (tensor("y", "FP32", -1, -1),), True)
    assert reconcile(found, ModelConfig(), contract({"x": [-1, 4]}, {"y": [-1, 3]}), tmp_path).batchable
