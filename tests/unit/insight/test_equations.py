"""Every equation against ONNX's own reference implementation, and against the runtime, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator
from tests.unit.insight.made import chain, network, odd, rows, weights

from forwardpass.errors import InsightError
from forwardpass.insight import equations, ort_profile
from forwardpass.model import onnx_graph

Z = np.random.default_rng(3).standard_normal((5, 4)) * 3
POSITIVE = np.abs(Z) + 0.1
FOUR = np.random.default_rng(4).standard_normal(4)
COUNTS = np.array([2, 0, 1])

# By operator: the inputs, and the attributes, of the cases that are tried.
CASES: dict[str, list[tuple[list[Any], dict[str, Any]]]] = {
    "Gemm": [
        ([Z, weights(6, 4).astype(float), np.ones(6)], {"transB": 1}),
        ([Z, weights(5, 2).astype(float)], {"transA": 1, "alpha": 0.5}),
        ([Z, weights(4, 2).astype(float), np.ones((5, 2))], {"beta": -2.0}),
    ],
    "MatMul": [([Z, weights(4, 3).astype(float)], {})],
    **{op: [([Z, FOUR], {})] for op in ("Add", "Sub", "Mul", "Div")},
    "Pow": [([POSITIVE, np.array(1.5)], {})],
    **{op: [([Z], {})] for op in ("Neg", "Abs", "Exp", "Erf", "Relu", "Sigmoid", "Tanh", "Softplus", "Softsign")},
    **{op: [([POSITIVE], {})] for op in ("Log", "Sqrt")},
    **{op: [([Z], {})] for op in ("HardSwish", "Mish", "Identity")},
    "Clip": [([Z, np.array(-1.0), np.array(2.0)], {}), ([Z, np.array(0.0)], {}), ([Z], {})],
    "LeakyRelu": [([Z], {}), ([Z], {"alpha": 0.2})],
    "PRelu": [([Z, FOUR], {})],
    "Elu": [([Z], {}), ([Z], {"alpha": 0.3})],
    "Selu": [([Z], {})],
    "HardSigmoid": [([Z], {}), ([Z], {"alpha": 0.1, "beta": 0.4})],
    "Gelu": [([Z], {}), ([Z], {"approximate": "tanh"})],
    "Softmax": [([Z], {}), ([Z], {"axis": 0}), ([Z * 1000], {})],
    "LogSoftmax": [([Z], {})],
    "BatchNormalization": [([Z, FOUR, FOUR, FOUR, POSITIVE[0]], {"epsilon": 0.01})],
    "LayerNormalization": [([Z, FOUR, FOUR], {}), ([Z, FOUR], {"epsilon": 0.1})],
    "Dropout": [([Z], {})],
    "Flatten": [([Z.reshape(5, 2, 2)], {}), ([Z.reshape(5, 2, 2)], {"axis": 2})],
    "Reshape": [([Z, np.array([0, 2, -1])], {})],
    "Transpose": [([Z], {}), ([Z.reshape(5, 2, 2)], {"perm": [0, 2, 1]})],
    "Concat": [([Z, Z, POSITIVE], {"axis": 1})],
    "Gather": [([Z, COUNTS], {}), ([Z, COUNTS], {"axis": 1})],
    "Squeeze": [([Z[:, None], np.array([1])], {}), ([Z[:1]], {})],
    "Unsqueeze": [([Z, np.array([1])], {})],
}
# Newer than the operator set of the others.
SWISH = [([Z], {}), ([Z], {"alpha": 0.5})]


def test_every_equation_has_a_case() -> None:
    assert {*CASES, "Swish"} == set(equations.EQUATIONS)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [pytest.param(op, *case, id=f"{op}-{i}") for op, cases in CASES.items() for i, case in enumerate(cases)],
)
def test_an_equation_is_the_operator(op: str, inputs: list[np.ndarray], attributes: dict[str, Any]) -> None:
    names = [f"x{i}" for i in range(len(inputs))]
    kinds = [helper.np_dtype_to_tensor_dtype(value.dtype) for value in inputs]
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node(op, names, ["y"], **attributes)],
            "one",
            [helper.make_tensor_value_info(n, k, v.shape) for n, k, v in zip(names, kinds, inputs, strict=True)],
            [helper.make_tensor_value_info("y", onnx.TensorProto.DOUBLE, None)],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
    )
    feeds = dict(zip(names, inputs, strict=True))
    (expected,) = ReferenceEvaluator(model).run(None, feeds)
    # Attributes as they are read from a file.
    node = onnx_graph.build(model, 5).nodes[0]
    got = equations.EQUATIONS[op](node.attributes, *inputs)
    assert got.shape == expected.shape
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)  # defaults of attributes are float32


@pytest.mark.parametrize(("inputs", "attributes"), SWISH)
def test_swish(inputs: list[np.ndarray], attributes: dict[str, float]) -> None:
    (z,) = inputs
    expected = z / (1 + np.exp(-attributes.get("alpha", 1.0) * z))
    np.testing.assert_allclose(equations.EQUATIONS["Swish"](attributes, z), expected)


@pytest.mark.parametrize(
    "model", [chain(4, 16, 16, 3), chain(4, 8, 3, activation="Gelu"), odd()], ids=["relu", "gelu", "odd"]
)
def test_a_whole_network_is_what_the_runtime_gives(model: onnx.ModelProto) -> None:
    found = onnx_graph.build(model, 9)
    x = rows(9)
    wanted, taken = equations.evaluate(found, {"x": x}, {})
    assert not taken
    names = [name for node in found.nodes for name in node.outputs]
    given = ort_profile.tensors(found, names, {"x": x})
    for name in names:
        assert wanted[name].dtype == np.float64
        np.testing.assert_allclose(given[name], wanted[name], rtol=1e-4, atol=1e-5)
        # It is the equations' own answer, not a copy of the runtime's.
        assert not np.array_equal(given[name], wanted[name]) or name in found.fixed


def test_a_node_without_an_equation_is_taken_and_named() -> None:
    model = network(
        [
            helper.make_node("Gemm", ["x", "W"], ["z"], "linear"),
            helper.make_node("Celu", ["z"], ["a"], "bend"),
            helper.make_node("Relu", ["a"], ["y"], "cut"),
        ],
        {"W": weights(4, 3)},
    )
    found = onnx_graph.build(model, 2)
    taken_from = {"a": np.array([[1.0, -2.0, 3.0]] * 2, np.float32)}
    values, taken = equations.evaluate(found, {"x": rows(2)}, taken_from)
    assert taken == ["bend"]
    np.testing.assert_array_equal(values["y"], [[1, 0, 3]] * 2)
    with pytest.raises(InsightError, match="node bend: there is no equation for Celu"):
        equations.evaluate(found, {"x": rows(2)}, {})


def test_rows_that_do_not_fit_are_named_with_the_node() -> None:
    with pytest.raises(InsightError, match=r"node linear_1 \(Gemm\): the equation does not fit"):
        equations.evaluate(onnx_graph.build(chain(4, 3), 2), {"x": rows(2, 5)}, {})
