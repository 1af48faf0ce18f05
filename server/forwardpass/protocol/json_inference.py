"""ModelInfer in the protocol's REST form: a body to a ModelInferRequest, a ModelInferResponse to a body. Pure.

With the binary tensor data extension a body is a JSON header, whose length stands in an HTTP header, and then the raw
contents of every tensor with a `binary_data_size`, in the order in which the header names them. Inputs and outputs may
be mixed: some in JSON, some binary. Nothing here knows a model: tensors are checked against it when the
ModelInferRequest is decoded, as those that come over gRPC are.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final, NamedTuple

import orjson

from forwardpass import protocol
from forwardpass.errors import InvalidRequest, printable
from forwardpass.protocol import json_tensors
from forwardpass.protocol.field_count import MOST_FIELDS
from forwardpass.protocol.json_messages import bounded, text_field, to_json, whole_number, write_parameters

LENGTH_HEADER: Final = "inference-header-content-length"
DIMENSION_LIMIT: Final = 1 << 62
ELEMENT_LIMIT: Final = 1 << 40
BINARY_SIZE: Final = "binary_data_size"
BINARY: Final = "binary_data"  # parameter of a requested output
ALL_BINARY: Final = "binary_data_output"  # parameter of a request: of every output that does not say


class OutputForms(NamedTuple):
    """Which outputs of a response go as binary data: those that `of` says, and by default all or none."""

    all_binary: bool
    of: dict[str, bool]

    def binary(self, name: str) -> bool:
        return self.of.get(name, self.all_binary)


class Body(NamedTuple):
    """A response's body. `header_length`: bytes of its JSON header if binary data follow; None: all of it is JSON."""

    content: bytes
    header_length: int | None


def parse_request(body: bytes, header_length: int | None, model: str, version: str) -> tuple[bytes, OutputForms]:
    """A request's body as a serialised ModelInferRequest, and the forms in which its outputs are wanted.

    `header_length` is the value of the HTTP header; None: it was not sent, and all of the body is JSON. Raises
    InvalidRequest naming what was expected and what came.
    """
    if header_length is not None and not 0 < header_length <= len(body):
        raise InvalidRequest(
            f"Inference-Header-Content-Length: expected 1 to {len(body)}, the length of the body, got {header_length}"
        )
    view = memoryview(body)
    given = json_tensors.loads(body if header_length is None else view[:header_length])
    if not isinstance(given, dict):
        raise InvalidRequest(f"expected an object with 'inputs', got {printable(json.dumps(given), 40)}")
    _bound_parameters(given)
    request = protocol.ModelInferRequest(model_name=model, model_version=version)
    if "id" in given:
        request.id = text_field(given["id"], "id")
    rest = view[len(body) if header_length is None else header_length :]
    _write_inputs(given.get("inputs"), rest, request)
    forms = _write_outputs(given.get("outputs", ()), request)
    all_binary = False
    parameters = given.get("parameters") or {}
    if isinstance(parameters, dict) and ALL_BINARY in parameters:
        all_binary = _flag(parameters[ALL_BINARY], f"parameter '{ALL_BINARY}'")
        parameters = {key: value for key, value in parameters.items() if key != ALL_BINARY}
    if parameters:
        write_parameters(parameters, request.parameters, "request")
    return request.SerializeToString(), OutputForms(all_binary, forms)


def _bound_parameters(given: dict[str, Any]) -> None:
    """Raises InvalidRequest for more parameters, of all tensors together, than a message may have fields."""
    count = 0
    for tensors in (given.get("inputs"), given.get("outputs")):
        for tensor in tensors if isinstance(tensors, list) else ():
            parameters = tensor.get("parameters") if isinstance(tensor, dict) else None
            count += len(parameters) if isinstance(parameters, dict) else 0
    if count > MOST_FIELDS:
        raise InvalidRequest(f"expected at most {MOST_FIELDS} parameters in a request, got {count}")


def raw_request(body: bytes, metadata: Any) -> tuple[bytes, OutputForms]:
    """A body that is nothing but the only input's raw contents, as a serialised ModelInferRequest. All outputs are
    wanted as binary data.

    `metadata`: the model's ModelMetadataResponse. Its shape must have no more sizes open than the number of rows and
    one other; where two are open, the body is one row. Raises InvalidRequest if that does not fit.
    """
    if len(metadata.inputs) != 1:
        names = ", ".join(tensor.name for tensor in metadata.inputs)
        raise InvalidRequest(f"a body without a JSON header is for models of one input; this one has {names}")
    tensor = metadata.inputs[0]
    itemsize = protocol.DATATYPES[tensor.datatype].itemsize
    shape = list(tensor.shape)
    if shape.count(-1) > 1 and shape[0] == -1:
        shape[0] = 1
    fixed = math.prod(size for size in shape if size != -1) * itemsize
    if not fixed or shape.count(-1) > 1 or len(body) % fixed or (-1 not in shape and len(body) != fixed):
        raise InvalidRequest(
            f"input '{tensor.name}': {len(body)} bytes do not fit {tensor.datatype} of shape {list(tensor.shape)}"
        )
    shape = [len(body) // fixed if size == -1 else size for size in shape]
    request = protocol.ModelInferRequest(model_name=metadata.name, raw_input_contents=[body])
    request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
    return request.SerializeToString(), OutputForms(True, {})


def _write_inputs(inputs: Any, rest: memoryview, request: Any) -> None:
    if not isinstance(inputs, list) or not inputs:
        raise InvalidRequest(f"inputs: expected a list of tensors, got {printable(json.dumps(inputs), 40)}")
    bounded(inputs, "inputs")
    start = 0
    for place, given in enumerate(inputs):
        if not isinstance(given, dict):
            raise InvalidRequest(f"inputs[{place}]: expected an object, got {printable(json.dumps(given), 40)}")
        name = text_field(given.get("name"), f"inputs[{place}].name")
        shown = printable(name)
        shape = _shape(given.get("shape"), shown)
        tensor = request.inputs.add(name=name, shape=shape)
        datatype = given.get("datatype")
        parameters = given.get("parameters") or {}
        size = parameters.get(BINARY_SIZE) if isinstance(parameters, dict) else None
        if size is not None:
            parameters = {key: value for key, value in parameters.items() if key != BINARY_SIZE}
        if parameters:
            write_parameters(parameters, tensor.parameters, f"input '{shown}'")
        tensor.datatype = json_tensors.datatype_of(datatype, shown).name
        shared = "shared_memory_region" in parameters
        if (size is not None) + ("data" in given) + shared != 1:
            raise InvalidRequest(
                f"input '{shown}': expected exactly one of data, the parameter {BINARY_SIZE}, and shared memory"
            )
        if size is not None:
            end = start + whole_number(size, f"input '{shown}': parameter {BINARY_SIZE}", DIMENSION_LIMIT)
            if end > len(rest):
                raise InvalidRequest(
                    f"input '{shown}': {BINARY_SIZE} is {end - start}, and the body has {len(rest) - start} bytes left"
                )
            request.raw_input_contents.append(bytes(rest[start:end]))
            start = end
        elif not shared:
            kind = protocol.DATATYPES[tensor.datatype]
            request.raw_input_contents.append(json_tensors.decode(given["data"], kind, shape, shown))
    if start != len(rest):
        raise InvalidRequest(f"the body has {len(rest) - start} bytes that belong to no input")


def _shape(given: Any, name: str) -> list[int]:
    if not isinstance(given, list):
        raise InvalidRequest(f"input '{name}': shape: expected a list of sizes, got {printable(json.dumps(given), 40)}")
    count = 1
    for size in given:
        count *= whole_number(size, f"input '{name}': shape", DIMENSION_LIMIT) or 1
    if count > ELEMENT_LIMIT or len(given) > 64:
        raise InvalidRequest(f"input '{name}': the sizes of {printable(json.dumps(given), 60)} are out of range")
    return given


def _write_outputs(outputs: Any, request: Any) -> dict[str, bool]:
    """Write the requested outputs, and return those whose form is asked for."""
    forms: dict[str, bool] = {}
    if not isinstance(outputs, (list, tuple)):
        raise InvalidRequest(f"outputs: expected a list, got {printable(json.dumps(outputs), 40)}")
    bounded(outputs, "outputs")
    for place, given in enumerate(outputs):
        if not isinstance(given, dict):
            raise InvalidRequest(f"outputs[{place}]: expected an object, got {printable(json.dumps(given), 40)}")
        name = text_field(given.get("name"), f"outputs[{place}].name")
        output = request.outputs.add(name=name)
        parameters = given.get("parameters") or {}
        if isinstance(parameters, dict) and BINARY in parameters:
            forms[name] = _flag(parameters[BINARY], f"output '{printable(name)}': parameter '{BINARY}'")
            parameters = {key: value for key, value in parameters.items() if key != BINARY}
        if parameters:
            write_parameters(parameters, output.parameters, f"output '{printable(name)}'")
    return forms


def _flag(given: Any, where: str) -> bool:
    if not isinstance(given, bool):
        raise InvalidRequest(f"{where}: expected true or false, got {printable(json.dumps(given), 40)}")
    return given


def write_response(message: bytes, forms: OutputForms) -> Body:
    """The body of a serialised ModelInferResponse whose outputs are raw.

    Raises InvalidRequest if an output cannot be written as JSON.
    """
    response = protocol.ModelInferResponse.FromString(message)
    raws = response.raw_output_contents[:]
    outputs: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for place, tensor in enumerate(response.outputs):
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape[:]}
        # One in shared memory has neither data nor parameters: Triton's C++ client takes an output that has
        # parameters for a binary one.
        if "shared_memory_region" not in tensor.parameters:
            raw = raws[place]
            if forms.binary(tensor.name):
                entry["parameters"] = {BINARY_SIZE: len(raw)}
                blobs.append(raw)
            else:
                data = json_tensors.encode(raw, protocol.DATATYPES[tensor.datatype], tensor.name)
                entry["data"] = orjson.Fragment(data)
        outputs.append(entry)
    head: dict[str, Any] = {"id": response.id} if response.id else {}
    head |= {"model_name": response.model_name, "model_version": response.model_version}
    if response.parameters:
        head["parameters"] = to_json(response)["parameters"]
    head["outputs"] = outputs
    header = orjson.dumps(head)
    return Body(b"".join((header, *blobs)), len(header)) if blobs else Body(header, None)
