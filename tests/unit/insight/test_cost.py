"""Costs by hand: what a layer stores, how many operations it takes, how many bytes it moves."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper
from tests.unit.insight.made import chain, network, odd, weights

from forwardpass.insight import cost
from forwardpass.model import onnx_graph


def test_a_layer_of_eight_units() -> None:
    found = onnx_graph.build(chain(4, 8, 3), 5)
    linear, relu, head = (cost.of_node(found, node) for node in found.nodes)
    # W [8, 4] and b [8]; a product and a sum for each of W, and the bias.
    assert (linear.parameters, linear.weight_bytes) == (40, 160)
    assert linear.flops == 5 * 8 * (2 * 4 + 1)
    assert linear.activation_bytes == 4 * 5 * (4 + 8)
    assert linear.batch_bytes == 160 + 4 * 5 * (4 + 8)
    assert (relu.parameters, relu.flops, relu.activation_bytes) == (0, 40, 4 * 5 * 16)
    assert head.flops == 5 * 3 * (2 * 8 + 1)
    together = cost.total([linear, relu, head])
    assert together.parameters == 40 + 27
    assert together.flops == 5 * (72 + 8 + 51)


def test_operations_grow_with_the_rows_and_weights_do_not() -> None:
    model = chain(4, 16, 16, 3)
    one, many = (
        cost.total(cost.of_node(found, node) for node in found.nodes)
        for found in (onnx_graph.build(model, 1), onnx_graph.build(model, 64))
    )
    assert many.flops == 64 * (one.flops or 0)
    assert many.activation_bytes == 64 * (one.activation_bytes or 0)
    assert many.weight_bytes == one.weight_bytes


@pytest.mark.parametrize(
    ("node", "per_row"),
    [
        (helper.make_node("MatMul", ["x", "W"], ["y"]), 3 * 2 * 4),
        (helper.make_node("Softmax", ["x"], ["y"]), 4 * 4),
        (helper.make_node("Tanh", ["x"], ["y"]), 4),
        (helper.make_node("Identity", ["x"], ["y"]), 0),
        (helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0), 4),
    ],
    ids=lambda value: getattr(value, "op_type", None),
)
def test_operations_by_operator(node: object, per_row: int) -> None:
    found = onnx_graph.build(network([node], {"W": weights(4, 3)}), 6)  # type: ignore[list-item]
    assert cost.of_node(found, found.nodes[0]).flops == 6 * per_row


def test_what_is_computed_from_stored_numbers_alone_costs_nothing() -> None:
    found = onnx_graph.build(odd(), 3)
    node = next(node for node in found.nodes if node.name == "weights_computed")
    spent = cost.of_node(found, node)
    assert (spent.flops, spent.activation_bytes, spent.parameters) == (0, 0, 24)


def test_an_operator_of_another_domain_is_not_guessed() -> None:
    model = network([helper.make_node("Secret", ["x"], ["y"], "secret", domain="nobody.knows")], {})
    model.opset_import.append(helper.make_opsetid("nobody.knows", 1))
    found = onnx_graph.build(model, 3)
    spent = cost.of_node(found, found.nodes[0])
    assert spent.flops is None and spent.activation_bytes is None and spent.batch_bytes is None
    assert cost.total([spent]).flops is None


def test_what_stays_inside_a_fused_node_is_never_in_memory() -> None:
    found = onnx_graph.build(chain(4, 8, 3), 10)
    apart = cost.moved_bytes(found, [["linear_1"], ["activation_1"], ["linear_2"]])
    fused = cost.moved_bytes(found, [["linear_1", "activation_1"], ["linear_2"]])
    assert apart == 4 * 10 * ((4 + 8) + (8 + 8) + (8 + 3))
    assert fused == 4 * 10 * ((4 + 8) + (8 + 3))
    assert cost.moved_bytes(found, [["linear_1", "activation_1", "linear_2"]]) == 4 * 10 * (4 + 3)


def test_a_tensor_that_two_read_is_read_twice() -> None:
    model = network(
        [
            helper.make_node("Relu", ["x"], ["a"], "bend"),
            helper.make_node("Neg", ["a"], ["b"], "turn"),
            helper.make_node("Add", ["a", "b"], ["y"], "sum"),
        ],
        {},
    )
    found = onnx_graph.build(model, 1)
    sizes = np.array([8, 8, 12])  # floats moved by each: in and out
    assert cost.moved_bytes(found, [["bend"], ["turn"], ["sum"]]) == 4 * int(sizes.sum())
