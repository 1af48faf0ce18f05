"""Messages in: what is accepted, what is refused and in which words. Answers out: byte for byte as protobuf has."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from tests.unit.made import Target, message, raw, signature, tensor

from forwardpass import protocol
from forwardpass.errors import InvalidRequest, RequestError, TooLarge, UnknownModel, printable
from forwardpass.inference.decoder import Decoder
from forwardpass.inference.encoder import encode_plain
from forwardpass.inference.request_template import RequestTemplate
from forwardpass.inference.tensor_contents import MOST_TEXTS
from forwardpass.model.signature import ModelSignature
from forwardpass.protocol.wire import varint

TYPED = [d for d in protocol.DATATYPES.values() if d.contents is not None]


class Only:
    """One model, whatever it is called."""

    generation = 0

    def __init__(self, found: ModelSignature, **more: Any) -> None:
        self.target = Target(found, **more)

    def resolve(self, name: str, version: str) -> Target:
        if name != "m":
            raise UnknownModel(f"there is no model '{printable(name)}'")
        return self.target


def decode(request: Any, found: ModelSignature | None = None, **more: Any) -> tuple[RequestTemplate, list[bytes]]:
    data = request if isinstance(request, bytes) else request.SerializeToString()
    header, buffers, _ = Decoder(Only(found or signature(), **more), 1 << 20).decode(data)
    return header, [bytes(b) for b in buffers]


def one(*shape: int, data: bytes | None = None, datatype: str = "FP32", name: str = "x") -> Any:
    """A request with one input, whose shape and data need not agree."""
    request = protocol.ModelInferRequest(model_name="m")
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    request.raw_input_contents.append(b"\0" * 4 * math.prod(shape) if data is None else data)
    return request


def refused(request: Any, found: ModelSignature | None = None, **more: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        decode(request, found, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", protocol.DATATYPES.values(), ids=lambda d: d.name)
@settings(max_examples=25)
@given(data=st.data())
def test_typed_and_raw_contents_of_every_datatype_are_the_same_bytes(
    datatype: protocol.Datatype, data: st.DataObject
) -> None:
    array = _array(datatype, data.draw)
    found = signature([tensor("x", datatype.name, -1, 2)])
    expected = raw(array)
    request = message([("x", array)])
    request.inputs[0].datatype = datatype.name  # BF16 travels in an array of another dtype
    header, (buffer,) = decode(request, found)
    assert (buffer, header.rows, header.batch_shapes) == (expected, len(array), (array.shape,))
    if datatype.contents is not None:
        _, (buffer,) = decode(message([("x", array)], typed=True), found)
        assert buffer == expected
    elif array.size:
        assert "travels in raw_input_contents only" in refused(_typed_floats(datatype.name, len(array)), found)


def _array(datatype: protocol.Datatype, draw: Any) -> NDArray[Any]:
    rows = draw(st.integers(0, 4))
    if datatype.numpy is None:
        words = draw(st.lists(st.text(max_size=5), min_size=2 * rows, max_size=2 * rows))
        return np.array(words, object).reshape(rows, 2)
    # A signalling NaN's payload is lost on its way through Python's floats; NaN itself is not.
    values = hnp.from_dtype(datatype.numpy, allow_nan=False) if datatype.numpy.kind == "f" else None
    array: NDArray[Any] = draw(hnp.arrays(datatype.numpy, (rows, 2), elements=values))
    return array


def _typed_floats(datatype: str, rows: int) -> Any:
    request = protocol.ModelInferRequest(model_name="m")
    request.inputs.add(name="x", datatype=datatype, shape=(rows, 2)).contents.fp32_contents.extend([1.0] * 2 * rows)
    return request


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf, 1e-45, -0.0])
def test_special_numbers_come_through_exactly(special: float) -> None:
    for dtype, name in ((np.float32, "FP32"), (np.float64, "FP64")):
        array = np.array([[special, 1.0]], dtype)
        for typed in (False, True):
            assert decode(message([("x", array)], typed=typed), signature([tensor("x", name, -1, 2)]))[1] == [
                raw(array)
            ]


def test_inputs_are_put_into_the_models_order() -> None:
    found = signature([tensor("a", "FP32", -1, 2), tensor("b", "INT64", -1)])
    a, b = np.ones((3, 2), np.float32), np.arange(3, dtype=np.int64)
    for arrays in ([("a", a), ("b", b)], [("b", b), ("a", a)]):
        for typed in (False, True):
            header, buffers = decode(message(arrays, typed=typed), found)
            assert buffers == [raw(a), raw(b)]
            assert (header.rows, header.stack_key) == (3, ((2,), ()))


def test_outputs_come_in_the_order_asked_for() -> None:
    found = signature(outputs=[tensor(name, "FP32", -1, 2) for name in "pqr"])
    x = [("x", np.ones((1, 2), np.float32))]
    assert decode(message(x), found)[0].outputs == (0, 1, 2)
    assert decode(message(x, outputs=["r", "p"]), found)[0].outputs == (2, 0)
    hidden = ModelSignature(found.inputs, found.outputs, True, frozenset("q"))
    assert decode(message(x), hidden)[0].outputs == (0, 2)
    assert decode(message(x, outputs=["q"]), hidden)[0].outputs == (1,)


def test_what_cannot_be_stacked_has_another_signature() -> None:
    found = signature([tensor("x", "FP32", -1, -1)])
    wide, narrow = decode(one(2, 5), found)[0], decode(one(2, 4), found)[0]
    assert wide.stack_key != narrow.stack_key == decode(one(7, 4), found)[0].stack_key
    alone = signature([tensor("x", "FP32", -1, -1)], batchable=False)
    assert decode(one(2, 5), alone)[0].stack_key != decode(one(3, 5), alone)[0].stack_key
    assert decode(one(2, 5), alone)[0].rows == 1


@pytest.mark.parametrize(
    ("parameters", "priority", "timeout"),
    [
        ({}, 0, math.inf),
        ({"priority": 2}, 2, math.inf),
        ({"priority": 0}, 0, math.inf),
        ({"timeout": 1500}, 0, 0.0015),
        ({"timeout": 0}, 0, math.inf),
        ({"priority": 3, "timeout": 1, "anything": 7}, 3, 1e-6),
        ({"sequence_id": 0}, 0, math.inf),  # says nothing
    ],
)
def test_parameters_say_priority_and_timeout(parameters: dict[str, int], priority: int, timeout: float) -> None:
    for kind in ("int64_param", "uint64_param"):
        request = one(1, 2)
        for key, value in parameters.items():
            setattr(request.parameters[key], kind, value)
        header, _ = decode(request, priorities=3)
        assert (header.priority, header.timeout) == (priority, pytest.approx(timeout))


def test_unknown_fields_are_skipped() -> None:
    data = varint(200 << 3 | 2) + b"\x03abc" + one(1, 2).SerializeToString() + varint(201 << 3) + b"\x05"
    assert decode(data)[1] == [b"\0" * 8]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (one(1, 2, name="z"), ["unexpected input 'z'", "expected x"]),
        (one(1, 2, name="a\nb\0\x1b[31m"), ["unexpected input 'a\\x0ab\\x00\\x1b[31m'"]),
        (protocol.ModelInferRequest(model_name="m"), ["missing input 'x'"]),
        (message([("x", np.ones((1, 2), np.float32))] * 2), ["input 'x' is given twice"]),
        (one(1, 2, datatype="FP64"), ["input 'x'", "expected datatype FP32", "got 'FP64'"]),
        (one(1, 2, datatype="FLOAT\n"), ["got 'FLOAT\\x0a'"]),
        (one(2), ["input 'x'", "expected 2 dimensions [-1,2]", "got [2]"]),
        (one(1, 2, 1), ["expected 2 dimensions [-1,2]", "got [1,2,1]"]),
        (one(1, 3), ["expected shape [-1,2]", "got [1,3]"]),
        (one(-1, 2, data=b""), ["at least 0", "got [-1,2]"]),
        (one(1 << 38, 2, data=b""), [f"{(1 << 38) * 8} bytes", "got 0"]),
        (one(1 << 62, 2, data=b"\0" * 8), [str(1 << 62)]),
        (one(3, 2, data=b"\0" * 23), ["takes 24 bytes", "got 23"]),
        (message([("x", np.ones((1, 2), np.float32))], outputs=["q"]), ["unknown output 'q'", "the outputs are y"]),
        (message([("x", np.ones((1, 2), np.float32))], outputs=["y", "y"]), ["output 'y' is requested twice"]),
        (message([("x", np.ones((1, 2), np.float32))], id="i" * 1025), ["the id has 1025 characters", "1024"]),
        (message([("x", np.ones((1, 2), np.float32))], model_name="n" * 10_240), ["model name has 10240 characters"]),
        (message([("x", np.ones((1001, 2), np.float32))]), ["1001 rows", "at most 1000"]),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)  # fmt: skip
def test_a_refusal_says_what_was_expected_and_what_came(request_: Any, words: list[str]) -> None:
    text = refused(request_)
    assert all(word in text for word in words), text


def test_empty_tensors_of_impossible_sizes_are_refused() -> None:
    found = signature([tensor("x", "FP32", -1, -1, -1)])
    assert "out of range" in refused(one(0, 1 << 62, 1 << 62, data=b""), found)
    assert decode(one(0, 7, 3), found)[0].rows == 0


def test_contents_must_be_in_one_place_each_and_for_each() -> None:
    both = message([("x", np.ones((1, 2), np.float32))], typed=True)
    both.raw_input_contents.append(b"\0" * 8)
    assert "input 'x': expected contents or raw_input_contents, got both" in refused(both)
    for count in (2, 3):
        many = one(1, 2)
        many.raw_input_contents.extend([b"\0" * 8] * (count - 1))
        assert f"{count} raw_input_contents for 1 inputs" in refused(many)
    none = one(1, 2)
    del none.raw_input_contents[:]
    assert "has 2 elements, got 0" in refused(none)


@pytest.mark.parametrize(
    ("field", "values", "datatype", "words"),
    [
        ("fp32_contents", [1.0], "FP32", "has 2 elements, got 1 in fp32_contents"),
        ("fp64_contents", [1.0, 2.0], "FP32", "FP32 travels in fp32_contents, got fp64_contents"),
        ("int_contents", [1, 300], "INT8", "300 is not in the range of INT8"),
        ("int_contents", [-32769, 0], "INT16", "-32769 is not in the range of INT16"),
        ("uint_contents", [256, 0], "UINT8", "256 is not in the range of UINT8"),
        ("int_contents", [1, 2], "UINT8", "UINT8 travels in uint_contents, got int_contents"),
        ("bytes_contents", [b"\xff", b""], "BYTES", "element 0 is not UTF-8"),
    ],
)
def test_typed_values_must_fit_their_datatype(field: str, values: list[Any], datatype: str, words: str) -> None:
    request = protocol.ModelInferRequest(model_name="m")
    getattr(request.inputs.add(name="x", datatype=datatype, shape=(1, 2)).contents, field).extend(values)
    assert words in refused(request, signature([tensor("x", datatype, -1, 2)]))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x01\0\0", "element 0 has 3 bytes of its 4-byte length"),
        (b"\x02\0\0\0a", "element 0 claims 2 bytes, 1 are left"),
        (b"\x01\0\0\0a\xff\xff\xff\xff", "element 1 claims 4294967295 bytes, 0 are left"),
        (b"\x01\0\0\0a", "expected 2 elements, got 1"),
        (b"\0\0\0\0" * 5, "expected 2 elements, got more than 2"),
        (b"\x01\0\0\0a\x01\0\0\0\xc3", "element 1 is not UTF-8"),
    ],
)
def test_text_with_bad_lengths_is_refused(data: bytes, words: str) -> None:
    assert words in refused(one(1, 2, data=data, datatype="BYTES"), signature([tensor("x", "BYTES", -1, 2)]))


def test_inputs_must_agree_in_rows() -> None:
    found = signature([tensor("a", "FP32", -1, 2), tensor("b", "INT64", -1)])
    text = refused(message([("a", np.ones((3, 2), np.float32)), ("b", np.ones(2, np.int64))]), found)
    assert "'a' 3" in text and "'b' 2" in text


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("priority", {"int64_param": 4}, "'priority': expected 1 to 3, or 0"),
        ("priority", {"int64_param": -1}, "got -1"),
        ("priority", {"string_param": "high"}, "expected an integer, got string_param"),
        ("timeout", {"int64_param": -5}, "'timeout': expected microseconds"),
        ("timeout", {}, "expected an integer, got nothing"),
        ("sequence_id", {"int64_param": 5}, "'sequence_id' is not supported"),
        ("sequence_start\n", {"bool_param": True}, "'sequence_start\\x0a' is not supported"),
    ],
)
def test_parameters_that_cannot_be_kept_are_refused(key: str, value: dict[str, Any], words: str) -> None:
    request = one(1, 2)
    request.parameters[key].CopyFrom(protocol.InferParameter(**value))
    assert words in refused(request, priorities=3)


@settings(max_examples=300)
@given(
    st.binary(max_size=60) | st.binary(max_size=20).map(lambda b: one(1, 2).SerializeToString()[: -len(b) or None] + b)
)
def test_no_bytes_make_anything_but_a_request_or_a_refusal(data: bytes) -> None:
    try:
        header, buffers = decode(data)
    except RequestError as error:
        assert not re.search(r"[\n\x00]|protobuf|upb|Traceback", str(error))
    else:
        assert [len(b) for b in buffers] == [8 * header.rows]


def test_a_message_over_the_limit_is_not_parsed() -> None:
    with pytest.raises(TooLarge, match="1048577 bytes, the limit is 1048576"):
        decode(b"\xff" * ((1 << 20) + 1))


# -- answers ----------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.data())
def test_replies_are_byte_for_byte_what_protobuf_writes(data: st.DataObject) -> None:
    outputs = [
        tensor(name, "FP32", -1, -1)
        for name in data.draw(st.lists(st.text(min_size=1), unique=True, min_size=1, max_size=4))
    ]
    places = tuple(data.draw(st.permutations(range(len(outputs)))))[: data.draw(st.integers(1, len(outputs)))]
    target = Target(signature(outputs=outputs), data.draw(st.text(min_size=1)), data.draw(st.sampled_from(("1", "20"))))
    template = RequestTemplate(target, 1, ((1, 2),), places, priority=0, timeout=math.inf)
    shapes = tuple(
        data.draw(
            st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), min_size=len(places), max_size=len(places))
        )
    )
    arrays = [np.full(shape, 7, np.float32) for shape in shapes]
    for request_id in data.draw(st.lists(st.text(max_size=5) | st.text("i", min_size=126, max_size=130), max_size=4)):
        expected = protocol.ModelInferResponse(model_name=target.name, model_version=target.version, id=request_id)
        for place, array in zip(places, arrays, strict=True):
            expected.outputs.add(name=outputs[place].name, datatype="FP32", shape=array.shape)
            expected.raw_output_contents.append(array.tobytes())
        id_field = protocol.ModelInferResponse(id=request_id).SerializeToString()
        assert encode_plain(template, id_field, arrays) == expected.SerializeToString()


@given(st.integers(0, 1 << 63))
def test_varints_are_protobufs(value: int) -> None:
    expected = protocol.InferParameter(uint64_param=value).SerializeToString()
    assert (expected[1:] or b"\0") == varint(value)


@pytest.mark.parametrize("typed", [False, True])
def test_texts_have_a_bound(typed: bool) -> None:
    """By their shape, before any is read: it is the elements that take time, however few bytes they have."""
    found = signature([tensor("x", "BYTES", -1, 1)])
    request = one(MOST_TEXTS + 1, 1, data=b"", datatype="BYTES")
    if typed:
        del request.raw_input_contents[:]
        request.inputs[0].contents.bytes_contents.append(b"")
    words = refused(request, found)
    assert f"has {MOST_TEXTS + 1} elements of BYTES, the limit is {MOST_TEXTS}; send fewer rows" in words
