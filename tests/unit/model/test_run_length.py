"""Which networks take as long as their rows are many, and which as long as values say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from tests.service import models

from forwardpass.model.onnx_file import OnnxFile, read_onnx
from forwardpass.model.run_length import varies
from forwardpass.model.signature import ModelSignature, TensorSpec
from forwardpass.protocol import DATATYPES


def signature(*shape: int, datatype: str = "FP32", batchable: bool = True) -> ModelSignature:
    return ModelSignature((TensorSpec("x", DATATYPES[datatype], shape),), (), batchable)


FIXED = signature(-1, 4)


def read(model: onnx.ModelProto, folder: Path) -> OnnxFile:
    onnx.save(model, folder / "model.onnx")
    return read_onnx(folder / "model.onnx")


def graph(*nodes: onnx.NodeProto, **constants: Any) -> onnx.ModelProto:
    """Unchecked, since shapes do not matter here."""
    initializers = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    x = helper.make_tensor_value_info("x", models.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", models.FLOAT, None)
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], initializers))


def node(op: str, *inputs: str, domain: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, ["y"], name="it", domain=domain, **attributes)


SHAPE = helper.make_node("Shape", ["x"], ["shape"])
BRANCH = helper.make_graph([], "branch", [], [])
FOUR = np.array([4], np.int64)


@pytest.mark.parametrize(
    "model",
    [
        models.chain(),
        models.quantised(),
        models.two_by_two(),
        graph(SHAPE, node("ConstantOfShape", "shape")),
        graph(SHAPE, helper.make_node("Gather", ["shape", "four"], ["size"]), node("Expand", "x", "size"), four=FOUR),
        graph(node("Resize", "x", "", "scales"), scales=np.ones(2, np.float32)),
        graph(node("Tile", "x", "four"), four=FOUR),
        graph(node("Gelu", "x", domain="com.microsoft")),
        graph(node("TreeEnsembleRegressor", "x", domain="ai.onnx.ml")),
    ],
)
def test_networks_whose_runs_can_be_predicted(model: onnx.ModelProto, tmp_path: Path) -> None:
    assert varies(read(model, tmp_path), FIXED) == ""


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (models.hold(), "(Loop) may run for as long as the values say"),
        (models.allocate(), "(ConstantOfShape) is given its size by 'most'"),
        (graph(node("If", "x", then_branch=BRANCH, else_branch=BRANCH)), "node 'it' (If) may run"),
        (graph(node("NonZero", "x")), "node 'it' (NonZero) gives as much as it finds"),
        (graph(node("Tile", "x", "x")), "node 'it' (Tile) is given its size by 'x'"),
        (graph(helper.make_node("Cast", ["x"], ["n"], to=7), node("Expand", "x", "n")), "is given its size by 'n'"),
        (graph(node("Own", "x", domain="my.own")), "node 'it' (Own) is of a domain that is not known"),
        (graph(node("Range", "x", "x", "x", domain="com.microsoft")), "is given its size by 'x'"),
        (graph(node("Unique", "x", domain="com.microsoft")), "gives as much as it finds"),
        (graph(node("MaxUnpool", "x", "x", "x")), "is given its size by 'x'"),
        (graph(node("BeamSearch", "x", domain="com.microsoft")), "searches"),
    ],
)
def test_networks_whose_runs_cannot(model: onnx.ModelProto, why: str, tmp_path: Path) -> None:
    assert why in varies(read(model, tmp_path), FIXED)


def test_inputs_of_any_size_and_files_that_are_not_read(tmp_path: Path) -> None:
    file = read(models.chain(), tmp_path)
    assert varies(file, signature(-1, -1)) == "input 'x' may have any size"
    assert varies(file, signature(-1, 4, batchable=False)) == "input 'x' may have any size"
    assert varies(file, signature(1, 4, batchable=False)) == ""
    assert varies(file, signature(-1, 4, datatype="BYTES")) == "input 'x' is text, of any length"
    assert varies(None, FIXED) == "its graph is not known"
