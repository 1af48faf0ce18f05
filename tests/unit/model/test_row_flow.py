"""Rows followed through graphs: what is proved, what is found to mix, and that a proof is never wrong.

Whatever is called independent is run: among other neighbours, at other places, every row must come out the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tests.service import models

from forwardpass.execution.ort_session import OrtSession
from forwardpass.execution.providers import place
from forwardpass.model.onnx_file import read_onnx
from forwardpass.model.row_flow import Proof, RowFlow, prove, prove_graph

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
INDEPENDENT, MIXES, UNKNOWN = RowFlow.INDEPENDENT, RowFlow.MIXES, RowFlow.UNKNOWN
Node = tuple[Any, ...]  # operator, inputs, outputs, attributes


def model(
    nodes: Sequence[Node],
    constants: dict[str, Any] | None = None,
    shape: Sequence[Any] = ("batch", 4),
    opset: int = 20,
    kind: int = FLOAT,
    out: int = 2,
) -> onnx.ModelProto:
    """x of `shape` to y, with nodes as (operator, inputs, outputs, attributes); y has `out` axes of any size."""
    made = [helper.make_node(n[0], n[1].split(), n[2].split(), **(n[3] if len(n) > 3 else {})) for n in nodes]
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("x", kind, list(shape))],
        [helper.make_tensor_value_info("y", FLOAT, ["batch", *[None] * (out - 1)])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def proved(found: onnx.ModelProto, folder: Path) -> Proof:
    path = folder / "model.onnx"
    onnx.save(found, str(path))
    return prove(path)


def check_by_running(found: onnx.ModelProto, folder: Path, shape: Sequence[int], kind: int = FLOAT) -> None:
    """Every row of a batch comes out the same with other neighbours and at another place, but for rounding."""
    path = folder / "run.onnx"
    onnx.save(found, str(path))
    session = OrtSession(path, place("cpu", 1, "for a test"))
    rng = np.random.default_rng(7)

    def rows(count: int) -> Any:
        if kind == INT64:
            return rng.integers(0, 4, (count, *shape))
        return rng.standard_normal((count, *shape)).astype(np.float32)

    for size in (2, 5, 9):
        batch = rows(size)
        (base,) = session.run([batch], (0,))
        assert len(base) == size
        for keeps in range(size):
            other = rows(size)
            other[keeps] = batch[keeps]
            (again,) = session.run([other], (0,))
            np.testing.assert_array_equal(again[keeps], base[keeps])
        order = rng.permutation(size)
        (shuffled,) = session.run([batch[order]], (0,))
        np.testing.assert_allclose(shuffled, base[order], rtol=1e-4, atol=1e-5)
        (alone,) = session.run([batch[:1]], (0,))
        np.testing.assert_allclose(alone[0], base[0], rtol=1e-4, atol=1e-5)


W, ROW = np.ones((4, 4), np.float32), np.ones(4, np.float32)
CASES: dict[str, tuple[list[Node], dict[str, Any], tuple[int, ...], RowFlow, str]] = {
    "gemm": ([("Gemm", "x w b", "y")], {"w": W, "b": ROW}, (4,), INDEPENDENT, ""),
    "gemm turned": ([("Gemm", "x w", "t", {"transA": 1}), ("Identity", "t", "y")], {"w": np.ones((3, 3), np.float32)},
                    (4,), MIXES, "a node of Gemm sums over rows"),
    "matmul of rows": ([("Transpose", "x", "t"), ("MatMul", "x t", "y")], {}, (4,), MIXES, "multiplies rows with rows"),
    "matmul per row": ([("MatMul", "x x", "y")], {}, (4, 4), INDEPENDENT, ""),
    "mean of all": ([("ReduceMean", "x", "m"), ("Sub", "x m", "y")], {}, (4,), MIXES, "of ReduceMean reduces axis 0"),
    "mean of a row": ([("ReduceMean", "x a", "m"), ("Sub", "x m", "y")], {"a": np.array([-1])}, (4,), INDEPENDENT, ""),
    "mean over rows": ([("ReduceMean", "x a", "m"), ("Sub", "x m", "y")], {"a": np.array([0])}, (4,), MIXES, "axis 0"),
    "softmax": ([("Softmax", "x", "y", {"axis": 1})], {}, (4,), INDEPENDENT, ""),
    "softmax over rows": ([("Softmax", "x", "y", {"axis": 0})], {}, (4,), MIXES, "normalises over axis 0"),
    "cumsum": ([("CumSum", "x a", "y")], {"a": np.array(1)}, (4,), INDEPENDENT, ""),
    "cumsum over rows": ([("CumSum", "x a", "y")], {"a": np.array(0)}, (4,), MIXES, "works along axis 0"),
    "own statistics": ([("DynamicQuantizeLinear", "x", "q s z"), ("DequantizeLinear", "q s z", "y")], {}, (4,), MIXES,
                       "scales by the largest value of all rows"),
    "flattened": ([("Flatten", "x", "f"), ("Softmax", "f", "y", {"axis": 1})], {}, (2, 3), INDEPENDENT, ""),
    "folded": ([("Reshape", "x s", "f"), ("Softmax", "f", "g", {"axis": 1}), ("Reshape", "g t", "y")],
               {"s": np.array([-1, 3]), "t": np.array([-1, 6])}, (2, 3), INDEPENDENT, ""),
    "folded across": ([("Reshape", "x s", "f"), ("Softmax", "f", "g", {"axis": 1}), ("Reshape", "g t", "y")],
                      {"s": np.array([-1, 12]), "t": np.array([-1, 6])}, (2, 3), UNKNOWN,
                      "puts elements of several rows side by side"),
    "turned and back": ([("Transpose", "x", "t", {"perm": [1, 0, 2]}), ("Reshape", "t s", "f"), ("Gemm", "f w", "g"),
                         ("Reshape", "g u", "h"), ("Transpose", "h", "i", {"perm": [1, 0, 2]}), ("Flatten", "i", "y")],
                        {"s": np.array([-1, 4]), "w": W, "u": np.array([3, -1, 4])}, (3, 4), INDEPENDENT, ""),
    "by the number of rows": ([("Shape", "x", "s", {"end": 1}), ("Cast", "s", "f", {"to": FLOAT}), ("Div", "x f", "y")],
                              {}, (4,), UNKNOWN, "computes with the number of rows"),
    "a shape of its own": ([("Shape", "x", "s", {"end": 1}), ("Concat", "s r", "t", {"axis": 0}),
                            ("Reshape", "x t", "y")],
                           {"r": np.array([2, 2])}, (4,), INDEPENDENT, ""),
    "looked up": ([("Gather", "w x", "g"), ("ReduceSum", "g a", "y", {"keepdims": 0})],
                  {"w": np.arange(16, dtype=np.float32).reshape(4, 4), "a": np.array([1])}, (3,), INDEPENDENT, ""),
    "flipped": ([("Slice", "x b e a p", "y")],
                {"b": np.array([-1]), "e": np.array([-(2**31)]), "a": np.array([0]), "p": np.array([-1])}, (4,),
                UNKNOWN, "takes some of the rows by their places"),
    "einsum": ([("Einsum", "x w", "y", {"equation": "bi,ij->bj"})], {"w": W}, (4,), INDEPENDENT, ""),
    "einsum over rows": ([("Einsum", "x x", "y", {"equation": "bi,bj->ij"})], {}, (4,), MIXES, "sums over rows"),
    "training": ([("BatchNormalization", "x s b m v", "y m2 v2", {"training_mode": 1})],
                 dict.fromkeys("sbmv", ROW), (4,), MIXES, "computes statistics of all rows"),
    "normalised": ([("LayerNormalization", "x s", "y")], {"s": ROW}, (4,), INDEPENDENT, ""),
    "convolved": ([("Conv", "x w", "c"), ("GlobalAveragePool", "c", "p"), ("Flatten", "p", "y")],
                  {"w": np.ones((2, 3, 2, 2), np.float32)}, (3, 5, 5), INDEPENDENT, ""),
    "spread": ([("Unsqueeze", "x a", "u"), ("Expand", "u s", "e"), ("ReduceSum", "e a", "y", {"keepdims": 0})],
               {"a": np.array([1]), "s": np.array([1, 3, 1])}, (4,), INDEPENDENT, ""),
    "a constant of another size": ([("Add", "x c", "y")], {"c": np.ones((2, 4), np.float32)}, (4,), UNKNOWN,
                                   "combines rows by their places with a constant"),
    "an operator of one's own": ([("Trilu", "x", "y")], {}, (4,), UNKNOWN, "depends on a row's place"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_said_of_a_graph(name: str, tmp_path: Path) -> None:
    nodes, constants, shape, flow, why = CASES[name]
    kind = INT64 if name == "looked up" else FLOAT
    found = model(nodes, constants, ("batch", *shape), kind=kind)
    proof = proved(found, tmp_path)
    assert proof.flow is flow and why in proof.why, proof
    if flow is INDEPENDENT:
        check_by_running(found, tmp_path, shape, kind)


def test_older_softmax_takes_all_axes_from_its_own_on(tmp_path: Path) -> None:
    assert proved(model([("Softmax", "x", "y")], {}, ("batch", 4), opset=11), tmp_path).flow is INDEPENDENT
    assert proved(model([("Softmax", "x", "y", {"axis": 0})], {}, ("batch", 4), opset=11), tmp_path).flow is MIXES


def test_what_reaches_no_output_does_not_count(tmp_path: Path) -> None:
    nodes = [("ReduceMax", "x", "unused", {"keepdims": 0}), ("Relu", "x", "y")]
    assert proved(model(nodes), tmp_path).flow is INDEPENDENT


@pytest.mark.parametrize("layout", [0, 1])
def test_a_recurrent_layer_steps_along_time_or_along_rows(layout: int, tmp_path: Path) -> None:
    # [batch, steps, size] where the layer takes [steps, batch, size]: it steps from row to row.
    constants = {"w": np.ones((1, 8, 4), np.float32), "r": np.ones((1, 8, 2), np.float32)}
    nodes = [("LSTM", "x w r", "y", {"hidden_size": 2, "layout": layout})]
    proof = proved(model(nodes, constants, ("batch", 3, 4), out=4), tmp_path)
    assert proof.flow is (MIXES, INDEPENDENT)[layout]
    assert layout or "steps along axis 0" in proof.why


def test_a_node_is_named(tmp_path: Path) -> None:
    found = model([("ReduceMax", "x", "m"), ("Sub", "x m", "y")])
    found.graph.node[0].name = "largest"
    assert proved(found, tmp_path).why.startswith("node 'largest' (ReduceMax) reduces axis 0")


def test_a_file_that_cannot_be_read_proves_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no network")
    assert prove(tmp_path / "model.onnx") == Proof(UNKNOWN, "model.onnx is not an ONNX file, or was cut short")


def test_weights_are_skipped_and_shapes_are_read(tmp_path: Path) -> None:
    path = models.save(tmp_path, "m", models.chain((64, 32, 10))) / "model.onnx"
    file = read_onnx(path)
    assert file.graph.inputs == {"x": (None, 64)} and file.graph.outputs == ["y"]
    assert all(c.values is None for c in file.graph.constants.values())
    assert sorted(c.dims for c in file.graph.constants.values()) == [(10,), (10, 32), (32,), (32, 64)]
    assert prove_graph(file).flow is INDEPENDENT


# Steps that each take [batch, 4, 6] and give the same; what a graph of several comes to is then asked and run.
STEPS: dict[str, tuple[list[Node], dict[str, Any]]] = {
    "relu": ([("Relu", "in", "out")], {}),
    "scale": ([("Mul", "in c", "out")], {"c": np.float32(0.5)}),
    "bias": ([("Add", "in c", "out")], {"c": np.arange(6, dtype=np.float32)}),
    "linear": ([("MatMul", "in c", "out")], {"c": np.eye(6, dtype=np.float32)[::-1].copy()}),
    "softmax": ([("Softmax", "in", "out", {"axis": 2})], {}),
    "softmax of time": ([("Softmax", "in", "out", {"axis": 1})], {}),
    "softmax of rows": ([("Softmax", "in", "out", {"axis": 0})], {}),
    "centre a row": ([("ReduceMean", "in c", "m"), ("Sub", "in m", "out")], {"c": np.array([1, 2])}),
    "centre all": ([("ReduceMean", "in", "m"), ("Sub", "in m", "out")], {}),
    "attend": ([("Transpose", "in", "t", {"perm": [0, 2, 1]}), ("MatMul", "in t", "s"), ("MatMul", "s in", "u"),
                ("Mul", "u c", "out")], {"c": np.float32(0.01)}),
    "attend across": ([("Transpose", "in", "t", {"perm": [1, 0, 2]}), ("Transpose", "t", "u", {"perm": [0, 2, 1]}),
                       ("MatMul", "t u", "s"), ("MatMul", "s t", "v"), ("Transpose", "v", "w", {"perm": [1, 0, 2]}),
                       ("Mul", "w c", "out")], {"c": np.float32(0.01)}),
    "fold": ([("Reshape", "in c", "f"), ("Softmax", "f", "g", {"axis": 1}), ("Reshape", "g d", "out")],
             {"c": np.array([-1, 6]), "d": np.array([-1, 4, 6])}),
    "fold twelve": ([("Reshape", "in c", "f"), ("Softmax", "f", "g", {"axis": 1}), ("Reshape", "g d", "out")],
                    {"c": np.array([-1, 12]), "d": np.array([-1, 4, 6])}),
    "fold wrongly": ([("Transpose", "in", "t", {"perm": [1, 0, 2]}), ("Reshape", "t c", "out")],
                     {"c": np.array([-1, 4, 6])}),
    "fold time first": ([("Transpose", "in", "t", {"perm": [1, 0, 2]}), ("Reshape", "t c", "f"), ("MatMul", "f e", "g"),
                         ("Reshape", "g d", "h"), ("Transpose", "h", "out", {"perm": [1, 0, 2]})],
                        {"c": np.array([-1, 6]), "d": np.array([4, -1, 6]), "e": np.eye(6, dtype=np.float32)}),
    "cumsum": ([("CumSum", "in c", "out")], {"c": np.array(1)}),
    "cumsum of rows": ([("CumSum", "in c", "out")], {"c": np.array(0)}),
    "flip time": ([("Slice", "in b e a p", "out")], {"b": np.array([-1]), "e": np.array([-(2**31)]), "a": np.array([1]),
                                                    "p": np.array([-1])}),
    "by its own shape": ([("Shape", "in", "s"), ("Reshape", "in s", "out")], {}),
    "halves": ([("Split", "in", "l r", {"axis": 2, "num_outputs": 2}), ("Concat", "r l", "out", {"axis": 2})], {}),
    "by the size": ([("Shape", "in", "s", {"end": 1}), ("Cast", "s", "f", {"to": FLOAT}), ("Div", "in f", "out")], {}),
}  # fmt: skip


@given(
    steps=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=5), joins=st.lists(st.booleans(), min_size=5)
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_proof_is_never_wrong(steps: list[str], joins: list[bool], tmp_path: Path) -> None:
    nodes: list[Node] = []
    constants: dict[str, Any] = {}
    before = "x"
    for number, step in enumerate(steps):
        made, own = STEPS[step]
        constants |= {f"{name}{number}": value for name, value in own.items()}
        out = f"v{number}"

        def renamed(text: str, number: int = number, source: str = before, result: str = out) -> str:
            names = {"in": source, "out": result}
            return " ".join(names.get(name, f"{name}{number}") for name in text.split())

        nodes += [(n[0], renamed(n[1]), renamed(n[2]), *n[3:]) for n in made]
        if joins[number]:  # beside what came before, as residual connections have it
            nodes.append(("Add", f"{out} {before}", f"j{number}"))
            out = f"j{number}"
        before = out
    nodes.append(("Identity", before, "y"))
    found = model(nodes, constants, ("batch", 4, 6), out=3)
    proof = proved(found, tmp_path)
    crosses = {"softmax of rows", "centre all", "attend across", "cumsum of rows"} & set(steps)
    if crosses or "fold wrongly" in steps or "by the size" in steps:
        assert proof.flow is not INDEPENDENT
    if proof.flow is INDEPENDENT:
        check_by_running(found, tmp_path, (4, 6))
    elif proof.flow is MIXES:
        assert crosses, proof
