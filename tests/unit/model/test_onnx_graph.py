"""The graph of layers: which nodes make a layer, what is z and what a, and the shape of every tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from tests.unit.insight.made import chain, network, odd, rows, save, weights

from forwardpass.errors import InsightError
from forwardpass.insight import ort_profile
from forwardpass.model import onnx_graph


def test_the_textbooks_network(document_repository: Path) -> None:
    found = onnx_graph.open_graph(document_repository / "document" / "1" / "model.onnx", 4)
    assert [found.shapes[tensor] for tensor in found.spine] == [(4, 5), (4, 10), (4, 10), (4, 3)]
    assert [found.labels.get(tensor, tensor) for tensor in found.spine] == ["x", "z1", "a1", "z2"]


def test_layers_of_a_chain() -> None:
    found = onnx_graph.build(chain(4, 8, 3), 2)
    assert [(layer.z, layer.a, layer.width) for layer in found.layers] == [("h1", "g1", 8), ("y", "y", 3)]
    assert found.labels == {"h1": "z1", "g1": "a1", "y": "z2"}
    assert [node.layer for node in found.nodes] == [1, 1, 2]


def test_layers_of_an_odd_network() -> None:
    found = onnx_graph.build(odd(), 2)
    assert [(layer.z, layer.a) for layer in found.layers] == [
        ("z", "silu"),  # the bias apart belongs to z; a product with itself to a
        ("z_two", "residual"),
        ("score", "score"),
        ("raw", "chances"),
    ]
    assert found.labels["centred"] == "a0"
    assert found.fixed >= {"W1", "minus_W1", "mean"} and "z" not in found.fixed
    layers = {node.name: node.layer for node in found.nodes}
    assert layers["centre"] == 0 and layers["residual"] == 2 and layers["softmax"] == 4


def test_an_index_is_no_activation() -> None:
    model = network(
        [
            helper.make_node("Gemm", ["x", "W"], ["z"], "linear"),
            helper.make_node("Relu", ["z"], ["a"], "bend"),
            helper.make_node("ArgMax", ["a"], ["y"], "which", axis=1),
        ],
        {"W": weights(4, 3)},
    )
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    (layer,) = onnx_graph.build(model, 2).layers
    assert (layer.z, layer.a) == ("z", "a")


def test_a_product_of_two_activations_is_no_layer() -> None:
    model = network(
        [
            helper.make_node("Transpose", ["x"], ["turned"], "turn"),
            helper.make_node("MatMul", ["x", "turned"], ["y"], "alike"),
        ],
        {},
    )
    assert onnx_graph.build(model, 2).layers == ()


@pytest.mark.parametrize("make", [lambda: chain(4, 8, 8, 3, activation="Tanh"), odd], ids=["chain", "odd"])
@pytest.mark.parametrize("count", [1, 7])
def test_inferred_shapes_are_those_of_a_run(make: object, count: int) -> None:
    found = onnx_graph.build(make(), count)  # type: ignore[operator]
    names = [name for node in found.nodes for name in node.outputs]
    run = ort_profile.tensors(found, names, {"x": rows(count)})
    assert {name: run[name].shape for name in names} == {name: found.shapes[name] for name in names}
    assert {name: run[name].dtype for name in names} == {name: found.dtypes[name] for name in names}


def test_constant_nodes_are_constants() -> None:
    value = onnx.numpy_helper.from_array(weights(4, 2))
    model = network(
        [helper.make_node("Constant", [], ["W"], value=value), helper.make_node("MatMul", ["x", "W"], ["y"])], {}
    )
    found = onnx_graph.build(model, 3)
    assert [node.op for node in found.nodes] == ["MatMul"]
    assert found.nodes[0].name == "MatMul_1"  # it had none
    assert found.constants["W"].shape == (4, 2)
    assert found.layers[0].width == 2


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a network")
    with pytest.raises(InsightError, match=r"model\.onnx cannot be read as ONNX"):
        onnx_graph.read(tmp_path / "model.onnx")
    with pytest.raises(InsightError, match="a batch of 0 rows: expected at least 1"):
        onnx_graph.open_graph(save(chain(4, 3), tmp_path), 0)
    with pytest.raises(InsightError, match="takes no input"):
        value = onnx.numpy_helper.from_array(np.ones(3, np.float32))
        onnx_graph.build(network([helper.make_node("Constant", [], ["y"], value=value)], {}, inputs=()), 1)
