"""Compare a network's tensors for given rows, in the runtime and as served, with its equations in NumPy float64."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.client import Client
from forwardpass.client.arrays import TensorInfo, fit
from forwardpass.console import array_files
from forwardpass.console.tables import shape
from forwardpass.errors import InsightError
from forwardpass.execution.ort_session import OrtSession
from forwardpass.execution.placement import CPU, Placement
from forwardpass.insight import equations, ort_profile
from forwardpass.insight.model_argument import Source
from forwardpass.model.contract import compare
from forwardpass.model.contract_tensor import DTYPES
from forwardpass.model.onnx_graph import Graph

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Check:
    """The result of comparing one tensor with its equation."""

    tensor: str  # "z1"
    equation: str  # "a0 W1ᵀ + b1"
    largest: float  # |difference|
    failure: str | None  # the violation of the tolerance, if any


def load_rows(path: Path, graph: Graph) -> Arrays:
    """A file's rows in the dtypes of the network's inputs: arrays [rows, ...] by name. Raises ForwardpassError."""
    declared = {value.name: value for value in graph.model.graph.input}
    infos = []
    for name in graph.inputs:
        dims = declared[name].type.tensor_type.shape.dim
        sizes = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)
        infos.append(TensorInfo(name, _datatype(graph.dtypes[name]), sizes))
    arrays = array_files.read(path, sys.stdin, infos)
    missing = [info.name for info in infos if info.name not in arrays]
    if missing:
        raise InsightError(f"{path}: has no rows for the input {', '.join(missing)}")
    fitted = {}
    for info in infos:
        array = fit(arrays[info.name], info)
        if array.ndim != len(info.shape) or any(w not in (-1, s) for w, s in zip(info.shape, array.shape, strict=True)):
            raise InsightError(f"{path}: has shape {shape(array.shape)}; expected {info}")
        fitted[info.name] = array
    if len({len(array) for array in fitted.values()}) > 1 or not len(next(iter(fitted.values()))):
        raise InsightError(f"{path}: expected as many rows for every input, and at least one")
    return fitted


def _datatype(dtype: np.dtype[Any]) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def against_equations(
    graph: Graph, found: Source, feeds: Arrays, save: Path | None, server: str | None, how: Mapping[str, Any]
) -> list[Check]:
    """Compare every a0, z and a, and the served outputs, with the equations in float64.

    `save`: an .npz file for the tensors. `server`: the address of a server whose response is compared too, called with
    the options `how` (see `Client`).
    Raises InsightError if the network cannot be run on these rows; CallError if the server fails.
    """
    labels = {name: graph.labels[name] for node in graph.nodes for name in node.outputs if name in graph.labels}
    unknown = [name for node in graph.nodes if not equations.has_equation(node) for name in node.outputs if name]
    given = ort_profile.tensors(graph, [*labels, *unknown], feeds)
    wanted, taken = equations.evaluate(graph, feeds, given)
    if save is not None:
        array_files.save(save, {**feeds, **{labels[name]: given[name] for name in labels}}, {})
    checks = []
    for name, label in labels.items():
        difference = compare({label: given[name]}, {label: wanted[name]}, found.tolerance)
        checks.append(Check(label, _equation(graph, name, taken), difference.largest, difference.failure))
    # As served: the unmodified file, in the server's own kind of session.
    session = OrtSession(found.path, Placement(CPU, 0, 1, "as served"))
    names = [tensor.name for tensor in session.signature.outputs]
    rows = [feeds[tensor.name] for tensor in session.signature.inputs]
    answers = dict(zip(names, session.run(rows, tuple(range(len(names)))), strict=True))
    ways = {"served": answers}
    if server is not None:
        with Client(server, **how) as client:
            ways[f"from {server}"] = dict(client.infer(found.name, feeds, outputs=names))
    for way, answer in ways.items():
        for name in names:
            difference = compare(answer, {name: wanted[name]}, found.tolerance)
            checks.append(Check(name, way, difference.largest, difference.failure))
    return checks


def _equation(graph: Graph, tensor: str, taken: list[str]) -> str:
    """The equation of a tensor, in the usual notation."""
    for layer in graph.layers:
        nodes = [node for node in graph.nodes if node.layer == layer.number and not graph.is_fixed(node)]
        if any(node.name in taken for node in nodes):
            return "taken from the runtime: no equation here"
        if tensor == layer.z:
            before = next((name for name in nodes[0].inputs if name and name not in graph.fixed), "")
            return f"{graph.labels.get(before, before)} W{layer.number}ᵀ + b{layer.number}"
        if tensor == layer.a:
            place = next(i for i, node in enumerate(nodes) if layer.z in node.outputs)
            after = [node.op for node in nodes[place + 1 :]]
            return f"{' ∘ '.join(reversed(after))}(z{layer.number})"
    prepared = [node.op for node in graph.nodes if node.layer == 0 and not graph.is_fixed(node)]
    return f"{' ∘ '.join(reversed(prepared))}({graph.inputs[0]})"
