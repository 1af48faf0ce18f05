"""ModelInfer's bodies in JSON and with binary tensors, to and from its messages."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from forwardpass import protocol
from forwardpass.errors import InvalidRequest
from forwardpass.protocol.bytes_tensors import pack
from forwardpass.protocol.json_inference import OutputForms, parse_request, raw_request, write_response

ROW = np.arange(4, dtype=np.float32)


def tensor(**more: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [1, 4], "datatype": "FP32"} | more


def parsed(given: Any, rest: bytes = b"") -> tuple[Any, OutputForms]:
    head = json.dumps(given).encode()
    message, forms = parse_request(head + rest, len(head) if rest else None, "m", "2")
    return protocol.ModelInferRequest.FromString(message), forms


def test_a_request_in_json() -> None:
    given = {
        "id": "7",
        "parameters": {"priority": 2, "binary_data_output": True},
        "inputs": [tensor(data=ROW.tolist(), parameters={"note": "a"})],
        "outputs": [{"name": "y", "parameters": {"classification": 3, "binary_data": False}}, {"name": "z"}],
    }
    request, forms = parsed(given)
    assert (request.model_name, request.model_version, request.id) == ("m", "2", "7")
    assert request.raw_input_contents == [ROW.tobytes()]
    assert dict(request.parameters).keys() == {"priority"}
    assert request.inputs[0].parameters["note"].string_param == "a"
    assert request.outputs[0].parameters["classification"].int64_param == 3
    assert dict(request.outputs[0].parameters).keys() == {"classification"}
    assert not forms.binary("y") and forms.binary("z")


def test_binary_and_json_inputs_may_be_mixed() -> None:
    first, second = ROW.tobytes(), (ROW + 1).tobytes()
    given = {
        "inputs": [
            tensor(parameters={"binary_data_size": 16}),
            tensor(name="j", data=[1, 2, 3, 4]),
            tensor(name="z", parameters={"binary_data_size": 16, "more": 1}),
        ]
    }
    request, _ = parsed(given, first + second)
    assert request.raw_input_contents == [first, np.array([1, 2, 3, 4], np.float32).tobytes(), second]
    assert not request.inputs[0].parameters and "more" in request.inputs[2].parameters


def test_an_input_in_shared_memory_brings_nothing() -> None:
    shared = {"shared_memory_region": "r", "shared_memory_byte_size": 16}
    request, _ = parsed({"inputs": [tensor(parameters=shared), tensor(name="j", data=[1, 2, 3, 4])]})
    assert len(request.raw_input_contents) == 1
    assert request.inputs[0].parameters["shared_memory_byte_size"].int64_param == 16


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "expected an object with 'inputs'"),
        ({}, "inputs: expected a list of tensors, got null"),
        ({"inputs": []}, "inputs: expected a list of tensors"),
        ({"inputs": [1]}, r"inputs\[0\]: expected an object"),
        ({"inputs": [{}]}, r"inputs\[0\].name: expected a string, got null"),
        ({"inputs": [{"name": "x"}]}, "input 'x': shape: expected a list of sizes, got null"),
        (
            {"inputs": [{"name": "x", "shape": [-1]}]},
            "input 'x': shape: expected a whole number of at least 0, below .*, got -1",
        ),
        ({"inputs": [{"name": "x", "shape": [2**40, 2**40]}]}, "input 'x': the sizes of .* are out of range"),
        ({"inputs": [{"name": "x", "shape": [0] + [2**61] * 3}]}, "are out of range"),
        ({"inputs": [{"name": "x", "shape": [1] * 65}]}, "are out of range"),
        ({"inputs": [{"name": "x", "shape": [1], "data": [1]}]}, "expected a datatype of BOOL"),
        ({"inputs": [tensor()]}, "expected exactly one of data, the parameter binary_data_size, and shared memory"),
        ({"inputs": [tensor(data=[1], parameters={"binary_data_size": 4})]}, "expected exactly one of data"),
        ({"inputs": [tensor(parameters={"binary_data_size": 16})]}, "binary_data_size is 16, and the body has 0 bytes"),
        ({"inputs": [tensor(parameters={"binary_data_size": -1})]}, "binary_data_size: expected a whole number"),
        ({"inputs": [tensor(data=[1, 2, 3, 4], parameters=[1])]}, "input 'x': expected an object of parameters"),
        ({"id": 7, "inputs": [tensor(data=[1, 2, 3, 4])]}, "id: expected a string, got 7"),
        ({"inputs": [tensor(data=[1, 2, 3, 4])], "outputs": {"a": 1}}, "outputs: expected a list"),
        ({"inputs": [tensor(data=[1, 2, 3, 4])], "outputs": ["y"]}, r"outputs\[0\]: expected an object"),
        ({"inputs": [tensor(data=[1, 2, 3, 4])], "outputs": [{}]}, r"outputs\[0\].name: expected a string"),
        ({"inputs": [tensor(data=[1, 2, 3, 4])], "parameters": [1]}, "request: expected an object of parameters"),
        (
            {"inputs": [tensor(data=[1, 2, 3, 4])], "parameters": {"binary_data_output": 1}},
            "parameter 'binary_data_output': expected true or false, got 1",
        ),
        (
            {"inputs": [tensor(data=[1, 2, 3, 4])], "outputs": [{"name": "y", "parameters": {"binary_data": "yes"}}]},
            "output 'y': parameter 'binary_data': expected true or false",
        ),
    ],
)
def test_what_is_no_request_is_refused_by_name(given: Any, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        parsed(given)


def test_bytes_that_belong_to_nothing_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="the body has 3 bytes that belong to no input"):
        parsed({"inputs": [tensor(data=[1, 2, 3, 4])]}, b"abc")
    for length in (0, 99):
        with pytest.raises(InvalidRequest, match="expected 1 to 2, the length of the body"):
            parse_request(b"{}", length, "m", "")


def answer() -> Any:
    response = protocol.ModelInferResponse(model_name="m", model_version="1", id="7")
    response.outputs.add(name="y", datatype="FP32", shape=[1, 4])
    response.outputs.add(name="word", datatype="BYTES", shape=[1])
    shared = response.outputs.add(name="s", datatype="FP32", shape=[1, 4])
    shared.parameters["shared_memory_region"].string_param = "r"
    response.raw_output_contents.extend([ROW.tobytes(), pack([b"one"]), b""])
    return response


def test_a_response_in_json() -> None:
    body = write_response(answer().SerializeToString(), OutputForms(False, {}))
    assert body.header_length is None
    assert json.loads(body.content) == {
        "id": "7",
        "model_name": "m",
        "model_version": "1",
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [0, 1, 2, 3]},
            {"name": "word", "datatype": "BYTES", "shape": [1], "data": ["one"]},
            {"name": "s", "datatype": "FP32", "shape": [1, 4]},  # its bytes are in its region
        ],
    }


def test_a_response_with_binary_data() -> None:
    body = write_response(answer().SerializeToString(), OutputForms(True, {"word": False}))
    assert body.header_length is not None
    head = json.loads(body.content[: body.header_length])
    assert head["outputs"][0]["parameters"] == {"binary_data_size": 16} and "data" not in head["outputs"][0]
    assert head["outputs"][1]["data"] == ["one"]
    assert body.content[body.header_length :] == ROW.tobytes()


def test_a_body_that_is_nothing_but_a_tensor() -> None:
    metadata = protocol.ModelMetadataResponse(name="m")
    metadata.inputs.add(name="x", datatype="FP32", shape=[-1, 4])
    message, forms = raw_request(ROW.tobytes() * 2, metadata)
    request = protocol.ModelInferRequest.FromString(message)
    assert list(request.inputs[0].shape) == [2, 4] and request.raw_input_contents == [ROW.tobytes() * 2]
    assert forms.binary("anything")
    with pytest.raises(InvalidRequest, match="17 bytes do not fit FP32 of shape"):
        raw_request(b"x" * 17, metadata)
    metadata.inputs[0].shape[:] = [-1, -1]
    assert list(protocol.ModelInferRequest.FromString(raw_request(ROW.tobytes(), metadata)[0]).inputs[0].shape) == [
        1,
        4,
    ]
    metadata.inputs[0].datatype = "BYTES"
    with pytest.raises(InvalidRequest, match="do not fit BYTES"):
        raw_request(b"x", metadata)
    metadata.inputs.add(name="z")
    with pytest.raises(InvalidRequest, match="for models of one input; this one has x, z"):
        raw_request(b"x", metadata)
