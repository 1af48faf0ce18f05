"""Whether a run's length follows from the number of its rows: then it can be predicted, and be made by a thread on
which others wait. Proved from the graph and the signature; what is not known here is taken to vary.

A run varies with the values of its rows where a loop or a branch depends on them, where they say how large a tensor
becomes, and where rows have any size or are text.
"""

from __future__ import annotations

from typing import Final

from forwardpass.model.onnx_file import OnnxFile, OnnxGraph, OnnxNode
from forwardpass.model.signature import ModelSignature

_ONNX: Final = ("", "ai.onnx", "ai.onnx.ml")
_CONTRIB: Final = "com.microsoft"  # ONNX Runtime's own; some of its operators search for as long as it takes
_SEARCHES: Final = frozenset({"BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch"})
# Their outputs' sizes are those of what they find.
_FINDS: Final = frozenset({"NonZero", "Unique", "Compress", "NonMaxSuppression", "StringSplit"})
# By operator, the places of the inputs that say how large an output is.
_SIZED_BY: Final = {
    "Range": (0, 1, 2), "ConstantOfShape": (0,), "Expand": (1,), "Tile": (1,), "Pad": (1,), "Resize": (2, 3),
    "Upsample": (1,), "OneHot": (1,), "CenterCropPad": (1,), "Col2Im": (1, 2), "AffineGrid": (1,), "DFT": (1,),
    "MaxUnpool": (2,),
    "STFT": (1, 3), "MelWeightMatrix": (0, 1), "HannWindow": (0,), "HammingWindow": (0,), "BlackmanWindow": (0,),
}  # fmt: skip
_SHAPES: Final = frozenset({"Shape", "Size"})


def varies(file: OnnxFile | None, signature: ModelSignature) -> str:
    """Why a run's length does not follow from the number of its rows; empty: it does.

    `file` None: its graph is not known.
    """
    for tensor in signature.inputs:
        sizes = tensor.shape[1:] if signature.batchable else tensor.shape
        if any(size < 0 for size in sizes):
            return f"input '{tensor.name}' may have any size"
        if tensor.datatype.numpy is None:
            return f"input '{tensor.name}' is text, of any length"
    return "its graph is not known" if file is None else _in_graph(file.graph)


def _in_graph(graph: OnnxGraph) -> str:
    fixed = set(graph.constants)  # names of tensors that are the same for all values of the inputs
    for node in graph.nodes:
        why = _at(node, fixed)
        if why:
            return f"node '{node.name or node.outputs[0]}' ({node.op}) {why}"
        if node.op in _SHAPES or fixed.issuperset(filter(None, node.inputs)):
            fixed.update(node.outputs)
    return ""


def _at(node: OnnxNode, fixed: set[str]) -> str:
    if node.domain == _CONTRIB and node.op in _SEARCHES:
        return "searches"
    if node.domain not in (*_ONNX, _CONTRIB):
        return "is of a domain that is not known"
    if any(isinstance(value, OnnxGraph) for value in node.attributes.values()):
        return "may run for as long as the values say"
    if node.op in _FINDS:
        return "gives as much as it finds"
    for place in _SIZED_BY.get(node.op, ()):
        name = node.inputs[place] if place < len(node.inputs) else ""
        if name and name not in fixed:
            return f"is given its size by '{name}'"
    return ""
