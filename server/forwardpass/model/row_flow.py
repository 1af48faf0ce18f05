"""Whether a network computes each row by itself, proved from its graph: no run, no values.

The batch axis is followed from the inputs through every node. Where each output's row depends on its own row alone the
network is independent by construction; where a node combines rows it is named; where an operator is not known here,
nothing is claimed, and a probe has to find out. Rounding is another question: kernels may round a row differently in
batches of different sizes.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from forwardpass.errors import ModelError
from forwardpass.model.onnx_file import OnnxFile, OnnxGraph, read_onnx
from forwardpass.model.row_rules import apply
from forwardpass.model.row_values import Dependence, Value, constant, rows, unknown

MOST_NODES = 50_000


class RowFlow(enum.Enum):
    """What was proved."""

    INDEPENDENT = "independent by construction"
    MIXES = "mixes rows"
    UNKNOWN = "unknown"


class Proof(NamedTuple):
    """The verdict, and for all but INDEPENDENT the node, its operator and what it does."""

    flow: RowFlow
    why: str = ""


UNPROVED = Proof(RowFlow.UNKNOWN)


def prove(path: Path) -> Proof:
    """Follow the rows through the file's graph, axis 0 of every input. Unknown where it cannot be read."""
    try:
        return prove_graph(read_onnx(path))
    except ModelError as error:
        return Proof(RowFlow.UNKNOWN, str(error))


def prove_graph(file: OnnxFile, outputs: Sequence[str] | None = None) -> Proof:
    """As `prove`. `outputs`: the names that matter; None: all."""
    graph = file.graph
    if len(graph.nodes) > MOST_NODES:
        return Proof(RowFlow.UNKNOWN, f"it has {len(graph.nodes)} nodes; at most {MOST_NODES} are looked at")
    values = {name: replace(constant(c.dims, c.values), lead=c.lead) for name, c in graph.constants.items()}
    for name, shape in graph.inputs.items():
        values[name] = unknown(f"input '{name}' has no axis") if not shape else rows(shape)
    try:
        found = _follow(graph, file.opsets, values)
    except RecursionError:
        return Proof(RowFlow.UNKNOWN, "its graph is nested too deep")
    for name in graph.outputs if outputs is None else outputs:
        value = found.get(name, unknown(f"output '{name}' is not computed"))
        if value.kind is Dependence.MIXED:
            return Proof(RowFlow.MIXES, value.why)
    for name in graph.outputs if outputs is None else outputs:
        value = found.get(name, unknown(f"output '{name}' is not computed"))
        if value.kind is not Dependence.ROWS:
            what = value.why or f"output '{name}' has no rows"
            return Proof(RowFlow.UNKNOWN, what)
        if not value.plain:
            return Proof(RowFlow.UNKNOWN, f"output '{name}' does not have one row for each of the inputs along axis 0")
    return Proof(RowFlow.INDEPENDENT)


def _follow(graph: OnnxGraph, opsets: dict[str, int], values: dict[str, Value]) -> dict[str, Value]:
    for node in graph.nodes:
        given = [values.get(name, unknown(f"'{name}' is not known")) if name else None for name in node.inputs]
        results = apply(node, given, opsets)
        for place, name in enumerate(node.outputs):
            if name:
                result = results[place] if place < len(results) else results[-1]
                values[name] = _with_shape(result, graph.shapes.get(name))
    return values


def _with_shape(value: Value, declared: tuple[int | None, ...] | None) -> Value:
    """With the sizes that the file declares, where they are not known; the rows' axis stays open."""
    if declared is None or value.kind not in (Dependence.ROWS, Dependence.CONSTANT):
        return value
    if value.dims is None:
        return value if value.kind is Dependence.ROWS else value.shaped(declared)
    if len(declared) != len(value.dims):
        return value
    dims = tuple(
        size if size is not None or (value.kind is Dependence.ROWS and place == value.axis) else declared[place]
        for place, size in enumerate(value.dims)
    )
    if dims == value.dims:
        return value
    return replace(value, dims=dims)
