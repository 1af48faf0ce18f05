"""The cost of a node from its shapes alone: stored numbers, floating-point operations, bytes moved. Pure.

Counting rules: a multiplication and an addition are two operations, a bias one more per output element, an elementwise
function one per element (softmax four, normalisations as listed), moving and renaming none. Bytes are those of the
tensors read and written once; weights are read once per batch, whatever its rows. Caches and fusion are ignored, so a
measured time may be better than these bytes suggest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from forwardpass.model.onnx_graph import Graph, GraphNode

_MOVES = {
    *("Cast", "Concat", "Constant", "Dropout", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Shape"),
    *("Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
}
_PER_ELEMENT = {"Softmax": 4, "LogSoftmax": 4, "BatchNormalization": 4, "LayerNormalization": 8}


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one node, or of several together. None if a shape is unknown."""

    parameters: int  # number of stored values read
    weight_bytes: int
    flops: int | None  # per batch
    activation_bytes: int | None  # per batch: inputs read and outputs written

    @property
    def batch_bytes(self) -> int | None:
        return None if self.activation_bytes is None else self.weight_bytes + self.activation_bytes


def of_node(graph: Graph, node: GraphNode) -> Cost:
    """The cost of running a batch of `graph.rows` rows. A node computed from constants alone costs nothing."""
    stored = [name for name in dict.fromkeys(node.inputs) if name in graph.constants]
    parameters = sum(graph.constants[name].size for name in stored)
    weight_bytes = sum(graph.constants[name].nbytes for name in stored)
    if graph.is_fixed(node):
        return Cost(parameters, weight_bytes, 0, 0)
    moved = [name for name in (*dict.fromkeys(node.inputs), *node.outputs) if name and name not in graph.fixed]
    sizes = [graph.elements(name) for name in moved]
    nbytes = (
        None
        if None in sizes
        else sum((size or 0) * graph.itemsize(name) for size, name in zip(sizes, moved, strict=True))
    )
    return Cost(parameters, weight_bytes, _flops(graph, node), nbytes)


def moved_bytes(graph: Graph, groups: Iterable[Sequence[str]]) -> int | None:
    """Bytes of activations that cross from one group of nodes to another, written once and read once each.

    `groups`: names of nodes that run as one; a tensor inside a group never reaches memory. None if a shape is unknown.
    """
    by_name = {node.name: node for node in graph.nodes}
    moved = 0
    readers = {name: [node.name for node in graph.nodes if name in node.inputs] for name in graph.shapes}
    for group in groups:
        nodes = [by_name[name] for name in group]
        inner = {name for node in nodes for name in node.outputs}
        read = {name for node in nodes for name in node.inputs if name and name not in graph.fixed} - inner
        given = {name for name in inner if name in graph.outputs or any(r not in group for r in readers.get(name, ()))}
        for name in (*read, *given):
            size = graph.elements(name)
            if size is None:
                return None
            moved += size * graph.itemsize(name)
    return moved


def total(costs: Iterable[Cost]) -> Cost:
    """The sum; None for a figure that is unknown for any of the costs."""
    every = list(costs)
    flops = [c.flops for c in every]
    moved = [c.activation_bytes for c in every]
    return Cost(
        sum(c.parameters for c in every),
        sum(c.weight_bytes for c in every),
        None if None in flops else sum(f or 0 for f in flops),
        None if None in moved else sum(m or 0 for m in moved),
    )


def _flops(graph: Graph, node: GraphNode) -> int | None:
    given = graph.elements(node.outputs[0])
    if node.domain not in ("", "ai.onnx") or given is None:
        return None
    if node.op in _MOVES:
        return 0
    if node.op in ("Gemm", "MatMul"):
        shape = _shape(graph, node.inputs[0])
        if not shape:
            return None
        inner = shape[0] if node.op == "Gemm" and node.attributes.get("transA") else shape[-1]
        return given * (2 * inner + (len(node.inputs) > 2 and bool(node.inputs[2])))
    if node.op == "Conv":
        weight = _shape(graph, node.inputs[1])
        if not weight:
            return None
        inner = 1
        for size in weight[1:]:
            inner *= size
        return given * (2 * inner + (len(node.inputs) > 2 and bool(node.inputs[2])))
    if node.op.startswith("Reduce"):
        return graph.elements(node.inputs[0])
    return given * _PER_ELEMENT.get(node.op, 1)


def _shape(graph: Graph, name: str) -> tuple[int, ...] | None:
    return graph.constants[name].shape if name in graph.constants else graph.shapes.get(name)
