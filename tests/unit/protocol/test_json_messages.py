"""Messages as JSON, and parameters from it."""

from __future__ import annotations

from typing import Any

import pytest

from forwardpass import protocol
from forwardpass.errors import InvalidRequest
from forwardpass.protocol.json_messages import (
    text_field,
    to_json,
    whole_number,
    write_parameters,
    write_repository_parameters,
)


def test_a_message_keeps_its_own_names_and_64_bits() -> None:
    message = protocol.ModelStatistics(name="m", last_inference=2**62)
    message.batch_stats.add(batch_size=3)
    found = to_json(message)
    assert (found["name"], found["last_inference"], found["version"]) == ("m", 2**62, "")
    assert found["batch_stats"][0]["batch_size"] == 3
    assert "inference_stats" not in found, "a message that is not set is left out"


def test_enumerations_maps_and_bytes() -> None:
    config = protocol.ModelConfig(name="m")
    config.input.add(name="x", data_type=11, dims=[-1, 3])
    config.parameters["key"].string_value = "value"
    found = to_json(config)
    assert found["input"][0]["data_type"] == "TYPE_FP32" and found["input"][0]["dims"] == [-1, 3]
    assert found["parameters"] == {"key": {"string_value": "value"}}
    raw = protocol.ModelInferResponse(raw_output_contents=[b"\xff\x00"])
    assert to_json(raw)["raw_output_contents"] == ["/wA="]


def test_a_parameter_is_its_value() -> None:
    given = {"a": True, "b": -3, "c": 2**64 - 1, "d": 0.5, "e": "é"}
    request = protocol.ModelInferRequest()
    write_parameters(given, request.parameters, "request")
    assert to_json(request)["parameters"] == given
    assert request.parameters["c"].WhichOneof("parameter_choice") == "uint64_param"


@pytest.mark.parametrize("value", [None, [1], {"b64": "x"}, 2**64, -(2**63) - 1, "\ud800"])
def test_what_is_no_parameter_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="parameter 'key'"):
        write_parameters({"key": value}, protocol.ModelInferRequest().parameters, "request")
    with pytest.raises(InvalidRequest, match="parameter 'key'"):
        write_repository_parameters({"key": value}, protocol.RepositoryModelLoadRequest().parameters)


def test_files_are_in_base64() -> None:
    request = protocol.RepositoryModelLoadRequest()
    write_repository_parameters({"config": "{}", "file:1/model.onnx": "AAEC", "n": 1, "b": True}, request.parameters)
    assert request.parameters["file:1/model.onnx"].bytes_param == b"\0\1\2"
    for value in ("A", "????", 7):
        with pytest.raises(InvalidRequest, match="base64"):
            write_repository_parameters({"file:x": value}, request.parameters)


def test_parameters_are_an_object() -> None:
    for write in (write_repository_parameters, lambda g, p: write_parameters(g, p, "request")):
        with pytest.raises(InvalidRequest, match="expected an object"):
            write([1], protocol.ModelInferRequest().parameters)


def test_fields() -> None:
    assert text_field("é", "f") == "é" and whole_number(3, "f") == 3
    for wrong in (1, None, "\udc00"):
        with pytest.raises(InvalidRequest, match="f: "):
            text_field(wrong, "f")
    for wrong in (-1, True, 1.0, "1", None, 2**63):
        with pytest.raises(InvalidRequest, match="f: expected a whole number"):
            whole_number(wrong, "f")
