"""Graphs made to be called independent wrongly: each hides a dependence where a rule might not look for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.unit.model.test_row_flow import FLOAT, INT64, Node, model, proved

from forwardpass.model.row_flow import RowFlow, prove

COUNT: list[Node] = [("Shape", "x", "shape"), ("Gather", "shape zero", "rows")]  # [B]
ADDED: Node = ("Add", "x k", "y")
NUMBERS: dict[str, Any] = {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2]), "last": np.array([-1])}
TEN = np.arange(10, dtype=np.float32)
LESS_SUM: list[Node] = [("ReduceSum", "x axis", "sum", {"keepdims": 1}), ("Sub", "x sum", "y")]

# Nodes, constants beyond NUMBERS, shape and type of x.
CASES: dict[str, tuple[list[Node], dict[str, Any], tuple[Any, ...], int]] = {
    # -- what depends on how many rows there are
    "the count and one": ([*COUNT, ("Add", "rows one", "n"), ("Cast", "n", "k", {"to": FLOAT}), ("Div", "x k", "y")],
                          {}, ("b", 4), FLOAT),
    "the count squared": ([*COUNT, ("Mul", "rows rows", "n"), ("Cast", "n", "k", {"to": FLOAT}), ("Div", "x k", "y")],
                          {}, ("b", 4), FLOAT),
    "whether there is one row": ([*COUNT, ("Equal", "rows one", "n"), ("Cast", "n", "k", {"to": FLOAT}), ADDED],
                                 {}, ("b", 4), FLOAT),
    "so much of a constant": ([*COUNT, ("Slice", "ten zero rows zero", "part"), ("ReduceSum", "part", "sum"),
                               ("Reshape", "sum one", "k"), ADDED], {"ten": TEN}, ("b", 4), FLOAT),
    "so much of a row": ([*COUNT, ("Slice", "x zero rows one", "part"), ("ReduceSum", "part one", "y")],
                         {}, ("b", 9), FLOAT),
    "so many of the largest": ([*COUNT, ("TopK", "x rows", "part places"), ("ReduceSum", "part one", "y")],
                               {}, ("b", 9), FLOAT),
    "so many classes": ([*COUNT, ("OneHot", "x rows offon", "table"), ("ReduceSum", "table two", "y")],
                        {"offon": np.array([1, 2], np.float32)}, ("b", 4), INT64),
    "a row divided there": ([*COUNT, ("Sub", "nine rows", "rest"), ("Concat", "rows rest", "parts", {"axis": 0}),
                             ("Split", "x parts", "part more", {"axis": 1}), ("ReduceSum", "part one", "y")],
                            {"nine": np.array([9])}, ("b", 9), FLOAT),
    "a constant in so many rows": ([*COUNT, ("Concat", "rows last", "to", {"axis": 0}), ("Reshape", "ten to", "table"),
                                    ("ReduceMax", "table one", "most"), ("ReduceSum", "most", "sum"),
                                    ("Reshape", "sum one", "k"), ADDED], {"ten": TEN}, ("b", 4), FLOAT),
    "times the shape": ([("Shape", "x", "shape"), ("MatMul", "x shape", "m"), ("Unsqueeze", "m one", "n"),
                         ("Cast", "n", "y", {"to": FLOAT})], {}, ("b", 2), INT64),
    # -- axes that are computed otherwise than one might think
    "an axis by floats": ([("Cast", "one", "a", {"to": FLOAT}), ("Cast", "two", "b", {"to": FLOAT}),
                           ("Div", "a b", "half"), ("Mul", "half b", "c"), ("Sub", "c a", "d"),
                           ("Cast", "d", "axis", {"to": INT64}), *LESS_SUM], {}, ("b", 4), FLOAT),
    "an axis by booleans": ([("Cast", "two", "a", {"to": TensorProto.BOOL}), ("Cast", "a", "b", {"to": INT64}),
                             ("Sub", "b one", "axis"), *LESS_SUM], {}, ("b", 4), FLOAT),
    "axes by a table": ([("Add", "p q", "table"), ("Reshape", "table last", "axis"),
                         ("Transpose", "x", "t", {"perm": [1, 0, 2]}), ("ReduceSum", "t axis", "sum"),
                         ("Sub", "t sum", "u"), ("Transpose", "u", "y", {"perm": [1, 0, 2]})],
                        {"p": np.array([[0, 1]]), "q": np.array([[0], [1]])}, ("b", 4, 4), FLOAT),
    "axes by rows": ([("ReduceSum", "p x", "sum", {"keepdims": 1}), ("ReduceMax", "sum", "most"),
                      ("Reshape", "most one", "k"), ("Cast", "x", "f", {"to": FLOAT}), ("Add", "f k", "y")],
                     {"p": np.array([[1, 2], [3, 9]], np.float32)}, ("b",), INT64),
    "a rank that shifts": ([("Reshape", "four to", "w"), ("Cast", "w", "k", {"to": FLOAT}), ("Add", "x k", "u"),
                            ("ReduceSum", "u one", "sum"), ("Add", "u sum", "v"), ("Reshape", "v rows4", "y")],
                           {"four": np.arange(1, 5), "to": np.array([1, 1, -1]), "rows4": np.array([-1, 4])},
                           ("b", 4), FLOAT),
    # -- rows that are moved
    "rows halved and doubled": ([("Resize", "x - half", "u"), ("Resize", "u - twice", "y")],
                                {"half": np.array([0.5, 1], np.float32), "twice": np.array([2, 1], np.float32)},
                                ("b", 4), FLOAT),
    "rows resized to one": ([("Resize", "x - - to", "k"), ADDED], {"to": np.array([1, 4])}, ("b", 4), FLOAT),
    "means in a table": ([("LayerNormalization", "x g", "n m"), ("Reshape", "m rows4", "table"),
                          ("ReduceSum", "table one", "k"), ADDED],
                         {"g": np.ones(4, np.float32), "rows4": np.array([-1, 4])}, ("b", 4), FLOAT),
    "scales by rows": ([("Transpose", "x", "t", {"perm": [1, 0]}), ("ReduceMax", "x one", "m", {"keepdims": 0}),
                        ("Abs", "m", "s"), ("QuantizeLinear", "t s", "q", {"axis": 0}),
                        ("Cast", "q", "f", {"to": FLOAT}), ("Transpose", "f", "y", {"perm": [1, 0]})],
                       {}, ("b", 4), FLOAT),
    "noise like a constant": ([("RandomUniformLike", "ten", "noise"), ("ReduceSum", "noise", "sum"),
                               ("Reshape", "sum one", "k"), ADDED], {"ten": TEN}, ("b", 4), FLOAT),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_not_called_independent(name: str, tmp_path: Path) -> None:
    nodes, more, shape, kind = CASES[name]
    found = model(nodes, {**NUMBERS, **more}, shape, kind=kind)
    for node in found.graph.node:
        given = ["" if name == "-" else name for name in node.input]  # those that are left out
        node.ClearField("input")
        node.input.extend(given)
    assert proved(found, tmp_path).flow is not RowFlow.INDEPENDENT


def test_a_graph_within_a_node_may_take_any_tensor(tmp_path: Path) -> None:
    def branch(name: str) -> onnx.GraphProto:
        node = helper.make_node("ReduceSum", ["x", "zero"], ["o"])
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info("o", FLOAT, [1, 4])])

    choice = {"then_branch": branch("a"), "else_branch": branch("b")}
    nodes: list[Node] = [("If", "yes", "sum", choice), ("Reshape", "sum to", "k"), ADDED]
    found = model(nodes, {"zero": np.array([0]), "yes": np.array(True), "to": np.array([1, 4])})
    proof = proved(found, tmp_path)
    assert proof.flow is RowFlow.UNKNOWN and "graph of its own" in proof.why


@pytest.mark.parametrize(
    ("op", "shape", "attributes", "outputs"),
    [
        ("Normalizer", ("b",), {"norm": "L1"}, ["y"]),  # over all rows, where there is one axis
        ("LinearClassifier", ("b", 4), {"coefficients": [1.0] * 8, "classlabels_ints": [0, 1]}, ["label", "scores"]),
    ],
)
def test_tables_of_other_ranks(
    op: str, shape: tuple[Any, ...], attributes: dict[str, Any], outputs: list[str], tmp_path: Path
) -> None:
    nodes = [helper.make_node(op, ["x"], outputs, domain="ai.onnx.ml", **attributes)]
    if outputs[0] == "label":  # one a row, so that the last axis is the rows'
        nodes += [helper.make_node("Cast", ["label"], ["f"], to=FLOAT), helper.make_node("Softmax", ["f"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, shape)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(tmp_path / "model.onnx"))
    assert prove(tmp_path / "model.onnx").flow is not RowFlow.INDEPENDENT


def test_a_sparse_constant_has_a_shape_of_its_own(tmp_path: Path) -> None:
    found = model([("Add", "x k", "u"), ("ReduceSum", "u one", "s"), ("Add", "u s", "v"), ("Reshape", "v to", "y")],
                  {"one": np.array([1]), "to": np.array([-1, 4])})  # fmt: skip
    values = numpy_helper.from_array(np.array([1, 2], np.float32), "k")
    places = numpy_helper.from_array(np.array([0, 3]), "places")
    found.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [1, 1, 4]))
    assert proved(found, tmp_path).flow is not RowFlow.INDEPENDENT
