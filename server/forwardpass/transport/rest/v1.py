"""KServe's v1 and TensorFlow Serving's predict: `instances` or `inputs` in, `predictions` or `outputs` out.

Such a request names neither types nor shapes, so they are the model's. Pure.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

from forwardpass import protocol
from forwardpass.errors import InvalidRequest, printable
from forwardpass.protocol import json_tensors
from forwardpass.protocol.json_messages import text_field


def predict_request(given: Any, metadata: Any, version: str) -> tuple[bytes, bool]:
    """A serialised ModelInferRequest, and whether the answer is wanted by rows.

    `given`: the body's JSON. `metadata`: the model's ModelMetadataResponse. Raises InvalidRequest.
    """
    if not isinstance(given, dict) or ("instances" in given) == ("inputs" in given):
        raise InvalidRequest("expected an object with either 'instances' (a list of rows) or 'inputs' (by column)")
    by_rows = "instances" in given
    columns = _columns_of_rows(given["instances"], metadata) if by_rows else _columns(given["inputs"], metadata)
    request = protocol.ModelInferRequest(model_name=metadata.name, model_version=version)
    if "id" in given:
        request.id = text_field(given["id"], "id")
    for tensor in metadata.inputs:
        data = columns[tensor.name]
        shape = _shape(data, len(tensor.shape))
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
        raw = json_tensors.decode(data, protocol.DATATYPES[tensor.datatype], shape, printable(tensor.name))
        request.raw_input_contents.append(raw)
    return request.SerializeToString(), by_rows


def predict_response(message: bytes, by_rows: bool) -> bytes:
    """The JSON body for a serialised ModelInferResponse: one value for a single output, else an object of names."""
    response = protocol.ModelInferResponse.FromString(message)
    outputs: dict[str, Any] = {}
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        flat = json_tensors.loads(json_tensors.encode(raw, protocol.DATATYPES[tensor.datatype], tensor.name))
        outputs[tensor.name] = _nested(flat, list(tensor.shape))
    single = next(iter(outputs.values())) if len(outputs) == 1 else None
    if not by_rows:
        return _dumps({"outputs": outputs if single is None else single})
    if single is not None:
        return _dumps({"predictions": single})
    if not all(isinstance(values, list) for values in outputs.values()):
        raise InvalidRequest("the model's outputs have no rows: send 'inputs' in place of 'instances'")
    rows = zip(*outputs.values(), strict=True)
    return _dumps({"predictions": [dict(zip(outputs, row, strict=True)) for row in rows]})


def _columns_of_rows(instances: Any, metadata: Any) -> dict[str, Any]:
    names = [tensor.name for tensor in metadata.inputs]
    if not isinstance(instances, list) or not instances:
        raise InvalidRequest("instances: expected a list of at least one row")
    if not all(isinstance(row, dict) for row in instances):
        if len(names) > 1 or any(isinstance(row, dict) for row in instances):
            raise InvalidRequest(f"instances: expected rows that are objects with {', '.join(names)}")
        return {names[0]: instances}
    columns: dict[str, Any] = {}
    for name in names:
        columns[name] = [row.get(name, _MISSING) for row in instances]
        if any(value is _MISSING for value in columns[name]):
            raise InvalidRequest(f"instances: missing input '{printable(name)}' in a row")
    _known({name for row in instances for name in row}, names)
    return columns


def _columns(inputs: Any, metadata: Any) -> dict[str, Any]:
    names = [tensor.name for tensor in metadata.inputs]
    if not isinstance(inputs, dict):
        if len(names) > 1:
            raise InvalidRequest(f"inputs: expected an object with {', '.join(names)}")
        return {names[0]: inputs}
    for name in names:
        if name not in inputs:
            raise InvalidRequest(f"inputs: missing input '{printable(name)}'")
    _known(set(inputs), names)
    return inputs


_MISSING = object()


def _known(given: set[str], names: list[str]) -> None:
    unknown = given - set(names)
    if unknown:
        raise InvalidRequest(f"unexpected input '{printable(min(unknown))}'; expected {', '.join(names)}")


def _shape(data: Any, rank: int) -> list[int]:
    """The shape of nested lists, down to `rank` axes; whether they are even is checked when they are read."""
    shape: list[int] = []
    while isinstance(data, list) and len(shape) < rank:
        shape.append(len(data))
        data = data[0] if data else None
    return shape


def _nested(flat: list[Any], shape: list[int]) -> Any:
    if not shape:
        return flat[0]
    for size in reversed(shape[1:]):
        flat = [flat[i : i + size] for i in range(0, len(flat), size)] if size else [[] for _ in range(shape[0])]
    return flat


def _dumps(value: Any) -> bytes:
    text = orjson.dumps(value)
    # orjson writes null for the numbers that JSON does not have.
    return json.dumps(value).encode() if b"null" in text else text
