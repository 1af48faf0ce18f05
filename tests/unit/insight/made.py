"""Small ONNX networks for the tests of insight, built node by node. Weights are drawn once, with a fixed seed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

RNG = np.random.default_rng(7)


def network(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    features: int = 4,
    outputs: Sequence[str] = ("y",),
    inputs: Sequence[str] = ("x",),
) -> onnx.ModelProto:
    """Inputs are float32 [batch, features]; outputs [batch, any]."""
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", features]) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", f"places of {name}"]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def weights(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def chain(*widths: int, activation: str = "Relu", named: bool = True) -> onnx.ModelProto:
    """Fully connected layers of these widths, an activation between them, none after the last."""
    nodes, constants, tensor = [], {}, "x"
    for number, (taken, given) in enumerate(itertools.pairwise(widths), 1):
        constants |= {f"W{number}": weights(given, taken), f"b{number}": weights(given)}
        last = number == len(widths) - 1
        z = "y" if last else f"h{number}"
        name = f"linear_{number}" if named else ""
        nodes.append(helper.make_node("Gemm", [tensor, f"W{number}", f"b{number}"], [z], name, transB=1))
        if not last:
            tensor = f"g{number}"
            nodes.append(helper.make_node(activation, [z], [tensor], f"activation_{number}" if named else ""))
    return network(nodes, constants, widths[0])


def odd() -> onnx.ModelProto:
    """What a chain has not: a prepared input, a product with its bias apart, a residual, two heads, a fixed node."""
    node = helper.make_node
    return network(
        [
            node("Sub", ["x", "mean"], ["centred"], "centre"),
            node("Neg", ["minus_W1"], ["W1"], "weights_computed"),
            node("MatMul", ["centred", "W1"], ["product"], "product"),
            node("Add", ["b1", "product"], ["z"], "bias"),
            node("Sigmoid", ["z"], ["gate"], "gate"),
            node("Mul", ["z", "gate"], ["silu"], "silu"),
            node("Gemm", ["silu", "W2", "b2"], ["z_two"], "second"),
            node("Tanh", ["z_two"], ["bent"], "bend"),
            node("Add", ["bent", "silu"], ["residual"], "residual"),
            node("Gemm", ["residual", "W3"], ["score"], "head"),
            node("Gemm", ["residual", "W4"], ["raw"], "other_head"),
            node("Softmax", ["raw"], ["chances"], "softmax"),
        ],
        {
            "mean": weights(4),
            "minus_W1": weights(4, 6),
            "b1": weights(6),
            "W2": weights(6, 6),
            "b2": weights(6),
            "W3": weights(6, 1),
            "W4": weights(6, 3),
        },
        outputs=("score", "chances"),
    )


def save(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    onnx.save(model, folder / name)
    return folder / name


def rows(count: int, features: int = 4) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, features)).astype(np.float32)
