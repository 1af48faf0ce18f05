"""Rewrites an ONNX model so that its layers compute in half precision (FP16); its inputs and outputs stay FP32.

Raw features stay FP32 until the first matrix product: operators that standardise them need the whole range, which half
precision (11 bits, at most 65,504) does not have. Operators that lose accuracy (softmax, normalisations, sums over an
axis) stay FP32 as well, with casts around them. Works on bytes in memory; runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from forwardpass.errors import ExportError

AFFINE = frozenset({"Gemm", "MatMul", "Conv"})
# Operators between products: there one more rounding is one of many, and ONNX Runtime's CUDA provider has a
# half-precision kernel for each, so nothing falls back to the CPU.
POINTWISE = frozenset(
    {
        "Abs", "Add", "Clip", "Div", "Elu", "Erf", "Gelu", "HardSigmoid", "LeakyRelu", "Max", "Min", "Mul", "Neg",
        "PRelu", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sub", "Tanh", "ThresholdedRelu", "Where",
    }
)  # fmt: skip
MOVING = frozenset(
    {
        "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
        "Unsqueeze",
    }
)  # fmt: skip
LARGEST = float(np.finfo(np.float16).max)


def halve(model: bytes) -> bytes:
    """The serialized model with its layers in half precision; names and types of inputs and outputs stay.

    Raises ExportError if there is no matrix product to convert, a weight is too large, or there is control flow.
    """
    proto = onnx.load_model_from_string(model)
    graph = proto.graph
    for node in graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise ExportError(f"half precision: the network has control flow ({node.op_type}), which is not converted")
    _hoist_constants(graph)
    types = _types(proto)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    chosen = _chosen(graph, types, constants)
    if not any(graph.node[place].op_type in AFFINE for place in chosen):
        raise ExportError("half precision: the network has no matrix product in float32, so there is nothing to gain")
    writer = _Writer(graph, types, constants)
    for place, node in enumerate(graph.node):
        writer.add(node, narrow=place in chosen)
    writer.finish()
    del graph.value_info[:]  # they declare float32; readers of the file infer them
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString(deterministic=True))


def _chosen(graph: onnx.GraphProto, types: dict[str, int], constants: dict[str, onnx.TensorProto]) -> frozenset[int]:
    """Indices of the nodes that will compute in half precision."""
    # `raw`: floats before any product. `varies`: tensors that depend on an input; all others are folded at load.
    raw = {value.name for value in graph.input if types.get(value.name) == TensorProto.FLOAT}
    varies = {value.name for value in graph.input}
    chosen = set()
    for place, node in enumerate(graph.node):
        if not varies & set(node.input):
            continue
        varies.update(node.output)
        is_affine = node.op_type in AFFINE
        if raw & set(node.input) and not is_affine:
            raw.update(name for name in node.output if types.get(name) == TensorProto.FLOAT)
        elif _can_be_narrow(node, types):
            too_large = _too_large(node.input, constants)
            if too_large and is_affine:
                raise ExportError(f"half precision: {too_large}, and half precision holds {LARGEST:.0f} at most")
            if not too_large:
                chosen.add(place)
    return frozenset(chosen)


def _can_be_narrow(node: onnx.NodeProto, types: dict[str, int]) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type not in AFFINE | POINTWISE | MOVING:
        return False
    kinds = {types.get(name) for name in (*node.input, *node.output) if name}
    # A node with float64, float16 or a type that could not be inferred is left unchanged.
    return types.get(node.output[0]) == TensorProto.FLOAT and not kinds & {
        TensorProto.DOUBLE,
        TensorProto.FLOAT16,
        None,
    }


def _too_large(names: Iterable[str], constants: dict[str, onnx.TensorProto]) -> str:
    """The error text for a constant that would become infinite; '' if there is none."""
    for name in names:
        if name in constants and constants[name].data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(constants[name])
            with np.errstate(over="ignore"):
                lost = np.isfinite(values) & ~np.isfinite(values.astype(np.float16))
            if lost.any():
                return f"{name!r} has the value {values[lost][0]:.6g}"
    return ""


class _Writer:
    """Rewrites the nodes in their order, each with its inputs in the precision it takes.

    A tensor keeps its name in FP32 and is `NAME.half` in half precision. At the first use of the one that was not
    computed, a cast to it is added; constants are stored in the precisions that are used.
    """

    def __init__(self, graph: onnx.GraphProto, types: dict[str, int], constants: dict[str, onnx.TensorProto]) -> None:
        self._graph = graph
        self._types = types
        self._constants = constants
        self._nodes: list[onnx.NodeProto] = []
        self._taken = {*types, *constants, *(name for node in graph.node for name in (*node.input, *node.output))}
        self._wide = {value.name for value in graph.input}
        self._narrow: dict[str, str] = {}  # FP32 name -> name in half precision
        self._kept: dict[str, onnx.TensorProto] = {}  # constants to be stored, by their new names

    def add(self, node: onnx.NodeProto, narrow: bool) -> None:
        written = onnx.NodeProto()
        written.CopyFrom(node)
        take = self._take_narrow if narrow else self._take_wide
        written.input[:] = [take(name) for name in node.input]
        for place, name in enumerate(node.output):
            if narrow and self._types.get(name) == TensorProto.FLOAT:
                written.output[place] = self._narrow[name] = self._name(name)
            else:
                self._wide.add(name)
        self._nodes.append(written)

    def finish(self) -> None:
        """Replace the graph's nodes and constants by the rewritten ones."""
        for value in self._graph.output:
            self._take_wide(value.name)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        del self._graph.initializer[:]
        self._graph.initializer.extend(self._kept.values())

    def _take_wide(self, name: str) -> str:
        """`name` in its original precision, adding a cast if needed."""
        if name in self._constants:
            self._kept[name] = self._constants[name]
        elif name in self._narrow and name not in self._wide:
            self._cast(self._narrow[name], name, TensorProto.FLOAT)
            self._wide.add(name)
        return name

    def _take_narrow(self, name: str) -> str:
        """`name` in half precision if it is FP32, else in its original type."""
        if self._types.get(name) != TensorProto.FLOAT:
            return self._take_wide(name)
        if name not in self._narrow:
            self._narrow[name] = self._name(name)
            if name in self._constants:
                values = numpy_helper.to_array(self._constants[name]).astype(np.float16)
                self._kept[self._narrow[name]] = numpy_helper.from_array(values, self._narrow[name])
            else:
                self._cast(name, self._narrow[name], TensorProto.FLOAT16)
        return self._narrow[name]

    def _cast(self, source: str, target: str, to: int) -> None:
        self._nodes.append(helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=to))

    def _name(self, name: str) -> str:
        found = f"{name}.half"
        while found in self._taken:
            found += "_"
        self._taken.add(found)
        return found


def _hoist_constants(graph: onnx.GraphProto) -> None:
    """Turn Constant nodes into initializers, so that constants have only one form."""
    kept = []
    for node in graph.node:
        value = next((a for a in node.attribute if a.name == "value"), None) if node.op_type == "Constant" else None
        if value is None:
            kept.append(node)
            continue
        tensor = graph.initializer.add()
        tensor.CopyFrom(value.t)
        tensor.name = node.output[0]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(nodes)


def _types(proto: onnx.ModelProto) -> dict[str, int]:
    """The element type of every tensor whose type is declared or can be inferred."""
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    found = {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
        if value.type.tensor_type.elem_type
    }
    found.update({tensor.name: tensor.data_type for tensor in inferred.initializer})
    return found
