"""`forwardpass models`: what a server serves, what it does not, and why."""

from __future__ import annotations

import argparse
import json
from typing import Any

from forwardpass.client import CallError, Client, ModelInfo, ModelState, TensorInfo
from forwardpass.console import connection_options, tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    connection_options.add_call_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Raises ForwardpassError, whose text is one line."""
    with connection_options.client_of(args) as client:
        served = [(state, _describe(client, state)) for state in client.models()]
    if args.json:
        print(json.dumps([_model_as_json(state, info) for state, info in served], ensure_ascii=False))
        return 0
    lines = [[*_cells(state, info), state.reason] for state, info in served]
    header = ["NAME", "VERSION", "STATE", "INPUTS -> OUTPUTS", "BATCHING", "REASON"]
    if not any(state.reason for state, _ in served):
        header, lines = header[:-1], [line[:-1] for line in lines]
    print(tables.table(header, lines, range(len(header))))
    return 0


def _cells(state: ModelState, info: ModelInfo | None) -> list[str]:
    interface, batching = ("-", "-") if info is None else (str(info), info.batching or "-")
    return [state.name, state.version or "-", state.state, interface, batching]


def _describe(client: Client, state: ModelState) -> ModelInfo | None:
    if state.state != "READY":
        return None
    try:
        return client.metadata(state.name, version=state.version)
    except CallError:
        return None  # unloaded since the list was returned


def _model_as_json(state: ModelState, info: ModelInfo | None) -> dict[str, Any]:
    said: dict[str, Any] = {"name": state.name, "version": state.version, "state": state.state, "reason": state.reason}
    if info is not None:
        said["inputs"] = [_tensor_as_json(tensor) for tensor in info.inputs]
        said["outputs"] = [_tensor_as_json(tensor) for tensor in info.outputs]
        said["parameters"] = dict(info.parameters)
    return said


def _tensor_as_json(tensor: TensorInfo) -> dict[str, Any]:
    said: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
    words = {"labels": tensor.labels, "categories": tensor.categories}
    return said | {key: list(value) for key, value in words.items() if value}
