"""Networks have one shape where they differ in weights alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.service import models

from forwardpass.model.network_shape import network_shape


def shape_of(model: onnx.ModelProto, tmp_path: Path) -> bytes | None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return network_shape(path)


def reshaped(sizes: tuple[int, ...]) -> onnx.ModelProto:
    """x [batch, 4] -> y, in a shape that a constant says."""
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    outputs = [("y", models.FLOAT, ["batch", *sizes[1:]])]
    return models.network(nodes, [("x", models.FLOAT, ["batch", 4])], outputs, {"shape": np.array(sizes)})


def test_weights_are_left_out(tmp_path: Path) -> None:
    assert shape_of(models.chain(seed=0), tmp_path) == shape_of(models.chain(seed=1), tmp_path) is not None
    assert shape_of(models.quantised(0), tmp_path) == shape_of(models.quantised(1), tmp_path) is not None


def test_what_is_written_about_a_file_is_left_out(tmp_path: Path) -> None:
    plain, described = models.chain(), models.chain()
    described.producer_name, described.doc_string, described.graph.name = "other", "a network", "g2"
    described.graph.node[0].doc_string = "a layer"
    described.metadata_props.add(key="a", value="b")
    assert shape_of(plain, tmp_path) == shape_of(described, tmp_path)


def _operator(model: onnx.ModelProto) -> None:
    next(n for n in model.graph.node if n.op_type == "Relu").op_type = "Sigmoid"


def _attribute(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.add(name="alpha", type=onnx.AttributeProto.FLOAT, f=0.5)


def _opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version -= 1


def _datatype(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


@pytest.mark.parametrize("change", [_operator, _attribute, _opset, _datatype])
def test_anything_else_makes_another_shape(tmp_path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    changed = models.chain()
    change(changed)
    assert shape_of(changed, tmp_path) != shape_of(models.chain(), tmp_path)
    assert shape_of(models.chain((4, 9, 3)), tmp_path) != shape_of(models.chain((4, 8, 3)), tmp_path)


def test_constants_that_say_sizes_are_no_weights(tmp_path: Path) -> None:
    assert shape_of(reshaped((-1, 4)), tmp_path) != shape_of(reshaped((-1, 2, 2)), tmp_path)
    assert shape_of(reshaped((0, 2, 2)), tmp_path) != shape_of(reshaped((-1, 2, 2)), tmp_path)


def _with_external(kind: int) -> onnx.ModelProto:
    model = models.chain()
    tensor = model.graph.initializer[0]
    tensor.data_type = kind
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    return model


def test_weights_may_be_in_another_file_and_sizes_may_not(tmp_path: Path) -> None:
    assert shape_of(_with_external(TensorProto.FLOAT), tmp_path) is not None
    assert shape_of(_with_external(TensorProto.INT64), tmp_path) is None


def test_a_subgraphs_weights_are_left_out_too(tmp_path: Path) -> None:
    def branch(value: float, op: str = "Mul") -> onnx.ModelProto:
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        w = numpy_helper.from_array(np.full(4, value, np.float32), "w")
        inner = helper.make_graph([helper.make_node(op, ["x", "w"], ["y"])], "inner", [], [y], [w])
        node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])]
        inputs += [helper.make_tensor_value_info("c", TensorProto.BOOL, [])]
        return helper.make_model(helper.make_graph([node], "g", inputs, [y]))

    assert shape_of(branch(1.0), tmp_path) == shape_of(branch(2.0), tmp_path) is not None
    assert shape_of(branch(1.0), tmp_path) != shape_of(branch(1.0, "Add"), tmp_path)


@pytest.mark.parametrize("content", [b"", b"no network", b"\x3a\xff\xff\x03abc"])
def test_what_is_no_onnx_file_has_no_shape(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert network_shape(path) is None
    assert network_shape(tmp_path / "none") is None
