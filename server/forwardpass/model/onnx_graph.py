"""An ONNX file as a directed graph of layers: nodes in execution order, tensors with their shapes, z and a by name.

A layer begins at an affine node (a matrix product with constant weights, or a convolution); z is the result of the
affine part, including the bias, and a is the layer's output: the last tensor before the next layer begins. Nodes before
the first affine node prepare the input and belong to layer 0. Needs onnx; runs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import InsightError
from forwardpass.optional_imports import need

if TYPE_CHECKING:
    import onnx

AFFINE = ("Gemm", "MatMul", "Conv")
_FLOAT = np.dtype(np.float32)
ANY_SIZE = 4  # the size used for a symbolic dimension other than the batch


@dataclass(frozen=True, slots=True)
class GraphNode:
    """One operator. `inputs` are in the operator's order, "" for an omitted optional one."""

    name: str
    op: str
    domain: str  # "" for ONNX's own operators
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    layer: int  # 0: prepares the input


@dataclass(frozen=True, slots=True)
class GraphLayer:
    """z = W a + b of the layer before, a = g(z). `z` and `a` are tensor names, the same if there is no g."""

    number: int  # from 1
    z: str
    a: str
    width: int  # size of a's last axis


@dataclass(frozen=True)
class Graph:
    """A network at one batch size."""

    model: onnx.ModelProto
    rows: int
    nodes: tuple[GraphNode, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, NDArray[Any]]  # weights, biases and other tensors stored in the file
    shapes: Mapping[str, tuple[int, ...] | None]  # None if it could not be inferred
    dtypes: Mapping[str, np.dtype[Any]]

    @cached_property
    def producers(self) -> dict[str, GraphNode]:
        return {name: node for node in self.nodes for name in node.outputs}

    @cached_property
    def fixed(self) -> frozenset[str]:
        """Tensors that depend on no input: stored ones, and those computed from stored ones alone."""
        found = set(self.constants)
        for node in self.nodes:
            if all(name in found for name in node.inputs if name):
                found.update(node.outputs)
        return frozenset(found)

    @cached_property
    def layers(self) -> tuple[GraphLayer, ...]:
        found = []
        for number in range(1, max((node.layer for node in self.nodes), default=0) + 1):
            nodes = [node for node in self.nodes if node.layer == number and not self.is_fixed(node)]
            z = nodes[0].outputs[0]
            # A product without its own bias: an addition of a constant directly after it is the bias.
            if nodes[0].op != "Gemm" and len(nodes) > 1 and nodes[1].op == "Add" and z in nodes[1].inputs:
                other = [name for name in nodes[1].inputs if name != z]
                if other and other[0] in self.fixed:
                    z = nodes[1].outputs[0]
            # The last float tensor: others, such as the indices of ArgMax, are not activations.
            floats = [n.outputs[0] for n in nodes if self.dtypes.get(n.outputs[0], _FLOAT).kind == "f"]
            a = floats[-1] if floats else z
            shape = self.shapes.get(a)
            found.append(GraphLayer(number, z, a, shape[-1] if shape else 0))
        return tuple(found)

    @cached_property
    def labels(self) -> dict[str, str]:
        """Mathematical names of tensors: a0 for a prepared input, z1, a1, z2, ... The last a keeps its own name too."""
        found = {}
        prepared = [n for n in self.nodes if n.layer == 0 and not self.is_fixed(n)]
        if prepared and len(self.inputs) == 1:
            found[prepared[-1].outputs[0]] = "a0"
        for layer in self.layers:
            found[layer.a] = f"a{layer.number}"
            found[layer.z] = f"z{layer.number}"
        return found

    @cached_property
    def spine(self) -> tuple[str, ...]:
        """The inputs and then every z and a, in order: the main steps of the forward pass."""
        steps = dict.fromkeys(tensor for layer in self.layers for tensor in (layer.z, layer.a))
        return (*self.inputs, *steps)

    def is_fixed(self, node: GraphNode) -> bool:
        return all(name in self.fixed for name in node.outputs)

    def itemsize(self, tensor: str) -> int:
        return self.dtypes[tensor].itemsize if tensor in self.dtypes else 4

    def elements(self, tensor: str) -> int | None:
        """The number of elements of a tensor, over all rows; None if its shape is unknown."""
        if tensor in self.constants:
            return int(self.constants[tensor].size)
        shape = self.shapes.get(tensor)
        return None if shape is None else math.prod(shape)


def read(path: Path) -> onnx.ModelProto:
    """The file's model, with weights in external files. Raises InsightError."""
    library = need("onnx", "insight")
    try:
        model: onnx.ModelProto = library.load(str(path))
        library.checker.check_model(model)
    except Exception as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise InsightError(f"{path} cannot be read as ONNX: {text[0]}") from None
    return model


def open_graph(path: Path, rows: int) -> Graph:
    """The network in `path` for batches of `rows` rows. Raises InsightError."""
    return build(read(path), rows)


def build(model: onnx.ModelProto, rows: int) -> Graph:
    """Like `open_graph`, for a model in memory, which is not changed."""
    onnx = need("onnx", "insight")
    if rows < 1:
        raise InsightError(f"a batch of {rows} rows: expected at least 1")
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    inputs = tuple(value.name for value in model.graph.input if value.name not in constants)
    if not inputs:
        raise InsightError("the network takes no input")
    nodes = []
    numbers = layer_numbers(((n.op_type, n.input, n.output) for n in model.graph.node), inputs)
    for place, (node, layer) in enumerate(zip(model.graph.node, numbers, strict=True)):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant" and "value" in attributes:
            constants[node.output[0]] = onnx.numpy_helper.to_array(attributes["value"])
            continue
        name = node.name or f"{node.op_type}_{place}"
        nodes.append(
            GraphNode(name, node.op_type, node.domain, tuple(node.input), tuple(node.output), attributes, layer)
        )
    shapes, dtypes = _infer(model, rows, inputs)
    dtypes.update({name: array.dtype for name, array in constants.items()})
    outputs = tuple(value.name for value in model.graph.output)
    return Graph(model, rows, tuple(nodes), inputs, outputs, constants, shapes, dtypes)


def layer_numbers(nodes: Iterable[tuple[str, Sequence[str], Sequence[str]]], inputs: Iterable[str]) -> list[int]:
    """The layer of each node, given as (operator, inputs, outputs) in the order of execution; 0 before the first."""
    found = []
    layer_of = dict.fromkeys(inputs, 0)  # of every tensor that depends on an input
    affine = 0
    for op, given, made in nodes:
        data = [layer_of[name] for name in given if name in layer_of]
        layer = max(data, default=0)
        if op in AFFINE and data and any(name and name not in layer_of for name in given):
            affine += 1
            layer = affine
        if data:
            layer_of.update(dict.fromkeys(made, layer))
        found.append(layer)
    return found


def _infer(
    model: onnx.ModelProto, rows: int, inputs: tuple[str, ...]
) -> tuple[dict[str, tuple[int, ...] | None], dict[str, np.dtype[Any]]]:
    """Shapes and dtypes of all tensors, with `rows` for axis 0 of the inputs if it is of any size."""
    onnx = need("onnx", "insight")
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    del sized.graph.value_info[:]  # they contain symbols, and would take precedence over inferred shapes
    symbols: dict[str, int] = {}
    for value in sized.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if value.name not in inputs or dim.HasField("dim_value"):
                continue
            size = rows if axis == 0 else symbols.get(dim.dim_param, ANY_SIZE)
            symbols.setdefault(dim.dim_param, size)
            dim.dim_value = size
    for value in sized.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(sized, data_prop=True)
    except Exception as error:
        raise InsightError(f"shapes cannot be inferred: {str(error).strip().splitlines()[0]}") from None
    shapes: dict[str, tuple[int, ...] | None] = {}
    dtypes: dict[str, np.dtype[Any]] = {}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        kind = value.type.tensor_type
        dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim]
        shapes[value.name] = tuple(dims) if kind.HasField("shape") and -1 not in dims else None
        if kind.elem_type:
            dtypes[value.name] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return shapes, dtypes
