"""Messages of too many fields are refused before protobuf sees them; all others are let through."""

from __future__ import annotations

from typing import Any

import pytest

from forwardpass import protocol
from forwardpass.errors import InvalidRequest
from forwardpass.protocol.field_count import COUNTED_FROM, MOST_FIELDS, check_field_count
from forwardpass.protocol.wire import tensor_spans, varint

KIND = protocol.ModelInferRequest
ROOM = b"\x3a" + varint(COUNTED_FROM) + bytes(COUNTED_FROM)  # raw contents, so that the message is large


def repeated(part: Any, times: int) -> bytes:
    message: bytes = part.SerializeToString()
    return message * times


def one(what: str) -> Any:
    request = KIND()
    if what == "parameter":
        request.parameters["a"].bool_param = True
    elif what == "input":
        request.inputs.add()
    elif what == "raw":
        request.raw_input_contents.append(b"")
    elif what == "output parameter":
        request.outputs.add(name="y").parameters["a"].int64_param = 1
    elif what == "input parameter":
        request.inputs.add(name="x").parameters["a"].int64_param = 1
    return request


@pytest.mark.parametrize("what", ["parameter", "input", "raw", "output parameter", "input parameter"])
def test_too_many_of_anything_are_refused(what: str) -> None:
    part = one(what)
    with pytest.raises(InvalidRequest, match=f"more than {MOST_FIELDS} fields"):
        check_field_count(ROOM + repeated(part, MOST_FIELDS), KIND)
    check_field_count(ROOM + repeated(part, MOST_FIELDS // 8), KIND)


def test_they_are_counted_within_one_input_too() -> None:
    request = KIND()
    tensor = request.inputs.add(name="x")
    for i in range(MOST_FIELDS):
        tensor.parameters[str(i)].string_param = "x" * 16
    with pytest.raises(InvalidRequest, match="fields"):
        check_field_count(request.SerializeToString(), KIND)
    # The same value, over and over, within one entry of the map.
    value = protocol.InferParameter(bool_param=True).SerializeToString() * (COUNTED_FROM // 2)
    entry = b"\x12" + varint(len(value)) + value
    with pytest.raises(InvalidRequest, match="fields"):
        check_field_count(b"\x22" + varint(len(entry)) + entry, KIND)


def test_elements_are_not_counted() -> None:
    request = KIND()
    request.inputs.add(name="x").contents.bytes_contents.extend([b"ab"] * 50_000)
    request.inputs.add(name="y").contents.int_contents.extend([1] * 200_000)
    check_field_count(request.SerializeToString(), KIND)


def test_what_is_no_message_is_refused_here_only_if_it_is_large() -> None:
    groups = b"\x0b\x0c" * COUNTED_FROM  # which serialisers do not write
    for data in (groups, b"\xff" * COUNTED_FROM, ROOM[:-1]):
        with pytest.raises(InvalidRequest, match="the message is not a ModelInferRequest"):
            check_field_count(data, KIND)
    check_field_count(groups[:100], KIND)


def test_an_input_whose_elements_are_not_packed_is_not_walked_through() -> None:
    element = b"\x35\x00\x00\x80\x3f"  # fp32_contents, one element
    contents = element * 1_000_000
    tensor = b"\x2a" + varint(len(contents)) + contents
    message = b"\x2a" + varint(len(tensor)) + tensor
    assert tensor_spans(message, 0) is None
