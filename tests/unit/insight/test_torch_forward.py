"""A network from its file in PyTorch: the same answers, and what autograd keeps of a pass, counted by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from tests.unit.insight.made import chain, network, odd, rows

from forwardpass.errors import InsightError
from forwardpass.insight import equations
from forwardpass.insight.torch_forward import TorchForward, saved_bytes
from forwardpass.model import onnx_graph


def mixed() -> onnx.ModelProto:
    """A chain with a normalisation in it."""
    model = chain(4, 8, 3, activation="Gelu")
    ones = np.ones(8, np.float32)
    model.graph.initializer.extend([onnx.numpy_helper.from_array(ones * 2, "scale")])
    model.graph.node.insert(1, helper.make_node("LayerNormalization", ["h1", "scale"], ["normal"], "normalise"))
    model.graph.node[2].input[0] = "normal"
    return model


@pytest.mark.parametrize("make", [lambda: chain(4, 16, 16, 3), lambda: chain(4, 8, 3, activation="Tanh"), mixed])
def test_the_same_answers(make: object) -> None:
    found = onnx_graph.build(make(), 7)  # type: ignore[operator]
    x = rows(7)
    wanted, _ = equations.evaluate(found, {"x": x}, {})
    got = TorchForward(found)({"x": torch.from_numpy(x)})
    assert got.requires_grad
    np.testing.assert_allclose(got.detach().numpy(), wanted["y"], rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_weight() -> None:
    forward = TorchForward(onnx_graph.build(chain(4, 8, 3), 7))
    assert sum(weight.numel() for weight in forward.parameters) == 4 * 8 + 8 + 8 * 3 + 3
    forward({"x": torch.from_numpy(rows(7))}).sum().backward()
    assert all(weight.grad is not None for weight in forward.parameters)


def test_what_autograd_keeps_are_the_inputs_of_the_layers() -> None:
    # Two ReLUs: their outputs are kept once, for themselves and for the next layer. x and the weights are there anyway.
    for count in (1, 10):
        forward = TorchForward(onnx_graph.build(chain(4, 16, 32, 3), count))
        assert saved_bytes(forward, {"x": torch.from_numpy(rows(count))}) == 4 * count * (16 + 32)
    with torch.no_grad():
        assert saved_bytes(forward, {"x": torch.from_numpy(rows(count))}) == 0


def test_an_operator_that_is_not_known_is_named() -> None:
    with pytest.raises(InsightError, match="cannot run Mish in PyTorch; known are Gemm"):
        TorchForward(onnx_graph.build(network([helper.make_node("Mish", ["x"], ["y"])], {}), 1))
    with pytest.raises(InsightError, match="cannot run Neg in PyTorch"):
        TorchForward(onnx_graph.build(odd(), 1))
