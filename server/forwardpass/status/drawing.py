"""A served network's layers, drawn as `forwardpass trace` does, from the file alone: no onnx, and no weight is read.

Shapes are those the file has for its tensors, completed for the operators of feedforward networks; one that stays
unknown is drawn as one unit with a question mark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import ModelError
from forwardpass.insight.graph_svg import svg
from forwardpass.model.onnx_file import OnnxGraph, OnnxNode, read_onnx
from forwardpass.model.onnx_graph import Graph, GraphNode, layer_numbers

MOST_NODES = 64  # a picture of more takes many lines, and long to draw
BATCH = -1

Shape = tuple[int, ...]
Shapes = dict[str, Shape | None]

# Operators whose output has the shape that their inputs have together.
ELEMENTWISE = frozenset(
    {
        "Abs", "Add", "BatchNormalization", "Cast", "Celu", "Clip", "Div", "Dropout", "Elu", "Equal", "Erf", "Exp",
        "Gelu", "Greater", "HardSigmoid", "HardSwish", "Identity", "LayerNormalization", "LeakyRelu", "Less", "Log",
        "LogSoftmax", "Max", "Min", "Mish", "Mul", "Neg", "Normalizer", "PRelu", "Pow", "Reciprocal", "Relu", "Scaler",
        "Selu", "Sigmoid", "Softmax", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh", "ThresholdedRelu",
        "Where",
    }
)  # fmt: skip


def draw(path: Path, title: str) -> str:
    """An SVG of the network in `path`. Raises ModelError where it can't be read or drawn, with the reason."""
    graph = read_graph(path)
    steps = [node for node in graph.nodes if not graph.is_fixed(node)]
    if len(steps) > MOST_NODES:
        raise ModelError(f"{len(steps)} operators are too many to be drawn here; `forwardpass trace` draws them")
    if not steps:
        raise ModelError("the network's answer depends on no input: there is nothing to draw")
    stored = {node.name: sum([graph.elements(n) or 0 for n in node.inputs if n in graph.constants]) for node in steps}
    return svg(graph, title, (), stored)


def read_graph(path: Path) -> Graph:
    """The network's graph; the batch axis has the size BATCH, and stored tensors have shapes without values."""
    file = read_onnx(path).graph
    inputs = tuple(file.inputs)
    constants: dict[str, NDArray[Any]] = {name: _empty(constant.dims) for name, constant in file.constants.items()}
    nodes = []
    numbers = layer_numbers(((n.op, n.inputs, n.outputs) for n in file.nodes), inputs)
    for place, (node, layer) in enumerate(zip(file.nodes, numbers, strict=True)):
        name = node.name or f"{node.op}_{place}"
        nodes.append(GraphNode(name, node.op, node.domain, node.inputs, node.outputs, node.attributes, layer))
    model: Any = None  # onnx's own object, which the drawing does not use
    return Graph(model, BATCH, tuple(nodes), inputs, tuple(file.outputs), constants, _shapes(file, constants), {})


def _empty(dims: Sequence[int]) -> NDArray[Any]:
    """An array of this shape that takes no memory."""
    return np.broadcast_to(np.zeros((), np.float32), [max(0, size) for size in dims])


def _shapes(file: OnnxGraph, constants: Mapping[str, NDArray[Any]]) -> Shapes:
    found: Shapes = {name: array.shape for name, array in constants.items()}
    for name, shape in (*file.shapes.items(), *file.inputs.items()):
        found[name] = None if shape is None else tuple(BATCH if size is None else size for size in shape)
    for node in file.nodes:
        outputs = [name for name in node.outputs if name]
        if outputs and found.get(outputs[0]) is None:
            found[outputs[0]] = _shape_after(node, found)
    return found


def _shape_after(node: OnnxNode, shapes: Shapes) -> Shape | None:
    """The shape of a node's first output; None where that is not known."""
    given = [shapes.get(name) for name in node.inputs if name]
    first = given[0] if given else None
    if first is None:
        return None
    if node.op in ELEMENTWISE:
        known = [shape for shape in given if shape is not None]
        return _broadcast(known) if len(known) == len(given) else None
    if node.op == "Flatten" and node.attributes.get("axis", 1) == 1 and BATCH not in first[1:]:
        return (first[0], math.prod(first[1:]))
    if node.op in ("Gemm", "MatMul") and len(given) > 1 and first:
        weight = given[1]
        if weight is None or len(weight) < 2:
            return None
        across = node.op == "Gemm" and bool(node.attributes.get("transB", 0))
        return (*first[:-1], weight[-2] if across else weight[-1])
    return None


def _broadcast(shapes: Sequence[Shape]) -> Shape | None:
    length = max(len(shape) for shape in shapes)
    found = []
    for sizes in zip(*[(1,) * (length - len(shape)) + shape for shape in shapes], strict=True):
        other = {size for size in sizes if size != 1}
        if len(other) > 1:
            return None
        found.append(other.pop() if other else 1)
    return tuple(found)
