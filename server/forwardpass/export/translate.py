"""Converts a torch module to the bytes of an ONNX model by torch.onnx's dynamo exporter, without its output.

A failure of the exporter becomes an ExportError of a line or two that names the operator or the reason.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence

import onnx
import torch

from forwardpass.errors import ExportError
from forwardpass.export.input_spec import InputSpec
from forwardpass.export.torch_network import TorchNetwork, Values

# protobuf's limit for one message; a larger model would need its weights in separate files.
MAX_BYTES = 2**31 - 1

_OPERATOR = re.compile(r"<OpOverload\(op='(?P<op>[\w.]+)', overload='(?P<overload>\w+)'\)>")
_FIXED = re.compile(
    r"inferred a static shape of (?P<size>\d+) for dimension inputs\['(?P<name>[^']+)'\]\.shape\[(?P<axis>\d+)\]"
)
_USER_CODE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\w+)\n\s*(?P<code>[^\n]+)')


def translate(network: TorchNetwork, example: Values, opset: int) -> bytes:
    """The network as one serialized ONNX model, with symbolic dimensions dynamic.

    The bytes depend on the network alone: they contain no path, no stack trace and no time of this machine.
    Raises ExportError.
    """
    args, kwargs = network.arguments(example)
    shapes = {spec.name: _dynamic(spec) for spec in network.specs}
    try:
        with _quiet():
            program = torch.onnx.export(
                network.traced(),
                args,
                kwargs=kwargs,
                dynamo=True,
                verbose=False,
                external_data=False,
                opset_version=opset,
                input_names=[spec.name for spec in network.specs],
                output_names=list(network.output_names),
                dynamic_shapes=shapes if kwargs else tuple(shapes.values()),
            )
    except Exception as error:
        raise ExportError(f"{type(network.module).__name__} cannot be exported: {explain(error)}") from error
    if program is None:
        raise ExportError("torch.onnx.export gave no program; expected one from its dynamo exporter")
    proto = program.model_proto
    reached = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), opset)
    if reached != opset:
        raise ExportError(f"opset {opset} cannot be reached by this version of torch; it got to {reached}")
    _strip(proto)
    if proto.ByteSize() > MAX_BYTES:
        raise ExportError(f"the model takes {proto.ByteSize()} bytes; expected at most {MAX_BYTES} in one file")
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported model is not valid ONNX: {str(error).strip().splitlines()[0]}") from error
    return bytes(proto.SerializeToString(deterministic=True))


def explain(error: BaseException) -> str:
    """A summary of an exception of torch.onnx.export, in one or two lines."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    root = causes[-1]
    text = str(root).strip()
    where = _USER_CODE.findall(text)
    at = f"\n  at {where[-1][0]}:{where[-1][1]}: {where[-1][3].strip()}" if where else ""
    operator = _OPERATOR.search(text)
    if operator is not None and "No ONNX function" in text:
        return f"the operator {operator['op']}.{operator['overload']} has no form in ONNX"
    if type(root).__name__ == "GuardOnDataDependentSymNode":
        return f"its control flow depends on the values of a tensor{at}"
    fixed = _FIXED.search(text)
    if fixed is not None:
        return (
            f"its code fixes axis {fixed['axis']} of {fixed['name']!r} at {fixed['size']}, the size it was traced "
            "with; expected it to work for any size there"
        )
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()] or ["no reason was given"]
    # torch's message first states that there is a problem, and then lists the details.
    listed = [line.strip(" -") for line in text.splitlines() if line.startswith(("- ", "  - "))]
    summary = " ".join([lines[0], *listed[:1]])[:400]
    return f"{type(root).__name__}: {summary}{at}"


def _dynamic(spec: InputSpec) -> dict[int, str]:
    return {axis: dim for axis, dim in enumerate(spec.dims) if isinstance(dim, str)}


def _strip(proto: onnx.ModelProto) -> None:
    """Remove torch's notes about the machine and the source code."""
    del proto.metadata_props[:]
    proto.doc_string = ""
    _strip_graph(proto.graph)
    for function in proto.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        _strip_nodes(function.node)


def _strip_graph(graph: onnx.GraphProto) -> None:
    graph.doc_string = ""
    del graph.metadata_props[:]
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    _strip_nodes(graph.node)


def _strip_nodes(nodes: Sequence[onnx.NodeProto]) -> None:
    for node in nodes:
        node.doc_string = ""
        del node.metadata_props[:]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _strip_graph(attribute.g)
            for graph in attribute.graphs:
                _strip_graph(graph)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's output and logs during an export; failures are in the exception.

    Affects the whole process while it lasts, as sys.stdout, logging and warnings are global.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        sink = io.StringIO()
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
