"""Adds the activations between layers to a model's outputs, as `a1`, `a2`, ...: tensors that are computed anyway.

Tensors are renamed in place, not copied, so that a runtime fuses and runs the same operators. Layers are defined in
`model.onnx_graph`.
"""

from __future__ import annotations

import onnx

from forwardpass.errors import ExportError, InsightError
from forwardpass.model.onnx_graph import build


def expose(model: bytes) -> tuple[bytes, list[str]]:
    """The serialized model with its activations as additional outputs, and their names in order.

    An activation that is an output already is left out. Raises ExportError if there is none left to expose, or a name
    is taken.
    """
    proto = onnx.load_model_from_string(model)
    try:
        graph = build(proto, rows=2)
    except InsightError as error:
        raise ExportError(f"activations cannot be exposed: {error}") from None
    wanted = {layer.a: f"a{layer.number}" for layer in graph.layers if layer.a not in graph.outputs}
    if not wanted:
        raise ExportError("there are no activations to expose: the network has no layer before its outputs")
    tensors = {*graph.inputs, *graph.constants, *(name for node in graph.nodes for name in node.outputs)}
    taken = sorted(set(wanted.values()) & tensors)
    if taken:
        raise ExportError(
            f"activations are named {', '.join(wanted.values())}, but the network has a tensor {taken[0]!r}"
        )
    _rename(proto.graph, wanted)
    described = {value.name: value for value in onnx.shape_inference.infer_shapes(proto).graph.value_info}
    for name in wanted.values():
        if name not in described:
            raise ExportError(f"the shape of the activation {name!r} cannot be inferred")
        proto.graph.output.append(described[name])
    kept = [value for value in proto.graph.value_info if value.name not in wanted.values()]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString(deterministic=True)), list(wanted.values())


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Rename tensors in the graph and in the subgraphs of its nodes, which can use its tensors."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, names)
            for inner in attribute.graphs:
                _rename(inner, names)
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)
