"""What parameters ask for: read, checked, and carried by the header; and the answers that are sent the way they ask."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.unit import made

from forwardpass import protocol
from forwardpass.errors import InvalidRequest, RequestError, TooLarge, UnknownRegion
from forwardpass.inference.decoder import Decoder
from forwardpass.inference.encoder import classify, encode_with_options
from forwardpass.inference.parameters import OutputOptions, RegionRange, ResponseOptions, parse_request_parameters
from forwardpass.inference.request_template import RequestTemplate
from forwardpass.model.signature import ModelSignature, TensorSpec


class Memory:
    """Regions that are bytearrays: enough of one to see what is read and written."""

    most = 1000

    def __init__(self, **regions: bytes) -> None:
        self.regions = {name: bytearray(data) for name, data in regions.items()}

    def window(self, place: RegionRange) -> MemoryWindow:
        if place.region not in self.regions:
            raise UnknownRegion(f"there is no shared-memory region '{place.region}'")
        return MemoryWindow(self, place)


class MemoryWindow:
    def __init__(self, memory: Memory, place: RegionRange) -> None:
        self.memory, self.place = memory, place

    def read(self) -> bytes:
        start = self.place.offset
        return bytes(self.memory.regions[self.place.region][start : start + self.place.nbytes])

    def write(self, data: bytes) -> None:
        start = self.place.offset
        self.memory.regions[self.place.region][start : start + len(data)] = data


class Models:
    generation = 0

    def __init__(self, found: ModelSignature) -> None:
        self.target = made.Target(found, priorities=4)

    def resolve(self, _name: str, _version: str) -> Any:
        return self.target


TWO = made.signature(
    inputs=(made.tensor("a", "FP32", -1, 2), made.tensor("b", "INT64", -1)),
    outputs=(made.tensor("y", "FP32", -1, 3), made.tensor("z", "BYTES", -1), made.tensor("h", "FP16", -1, 1)),
)
A = np.array([[1, 2], [3, 4]], np.float32)
B = np.array([5, 6])


def parameters(**values: Any) -> dict[str, Any]:
    """As a request's parameters: by the kind of the value."""
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    return {key: protocol.InferParameter(**{kinds[type(value)]: value}) for key, value in values.items()}


def ask(request: Any, memory: Memory | None = None) -> tuple[RequestTemplate, list[bytes]]:
    header, buffers, _ = Decoder(Models(TWO), 1 << 20, memory).decode(request.SerializeToString())
    return header, [bytes(b) for b in buffers]


def put(entry: Any, **values: Any) -> None:
    for key, value in parameters(**values).items():
        entry.parameters[key].CopyFrom(value)


# -- of the request as a whole -----------------------------------------------------------------------------------------


def test_parameters_that_mean_nothing_here_have_no_effect() -> None:
    custom = parameters(mine="text", limit=3, flag=True, ratio=0.5, triton_enable_empty_final_response=True)
    assert parse_request_parameters(custom, 1) == (0, math.inf, False)


def test_those_of_the_schedule_are_read() -> None:
    assert parse_request_parameters(parameters(priority=3, timeout=1500), 4) == (3, pytest.approx(0.0015), False)
    unsigned = {"priority": protocol.InferParameter(uint64_param=2)}
    assert parse_request_parameters(unsigned, 4).priority == 2


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"priority": 5}, "1 to 4"),
        ({"priority": -1}, "1 to 4"),
        ({"priority": "high"}, "expected an integer, got string_param"),
        ({"timeout": -1}, "at least 0"),
        ({"timeout": True}, "expected an integer, got bool_param"),
        ({"binary_data_output": 1}, "expected a bool, got int64_param"),
        ({"sequence_id": 7}, "'sequence_id' is not supported"),
        ({"sequence_start": True}, "'sequence_start' is not supported"),
        ({"classification": 2}, "'classification' is not supported"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(said: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        parse_request_parameters(parameters(**said), 4)


def test_a_sequence_parameter_that_says_nothing_is_let_through() -> None:
    assert (
        parse_request_parameters(parameters(sequence_id=0, sequence_start=False, sequence_end=False), 1).priority == 0
    )


# -- inputs in shared memory -------------------------------------------------------------------------------------------


def shared(raw_of_b: bool = True, **place: Any) -> Any:
    """Input `a` in shared memory, `b` in the message."""
    request = made.message([("b", B)] if raw_of_b else [])
    entry = request.inputs.add(name="a", datatype="FP32", shape=A.shape)
    put(entry, **(place or {"shared_memory_region": "r", "shared_memory_byte_size": A.nbytes}))
    return request


def test_an_input_is_read_from_its_region_and_counted() -> None:
    request = shared(shared_memory_region="r", shared_memory_byte_size=A.nbytes, shared_memory_offset=3)
    header, buffers = ask(request, Memory(r=b"???" + A.tobytes()))
    assert buffers == [A.tobytes(), B.tobytes()]
    assert header.shared == A.nbytes and header.rows == 2


def test_such_a_request_is_read_anew_every_time() -> None:
    models = Models(made.signature())
    memory = Memory(r=A.tobytes())
    decoder = Decoder(models, 1 << 20, memory)
    request = made.message([])
    put(
        request.inputs.add(name="x", datatype="FP32", shape=A.shape),
        shared_memory_region="r",
        shared_memory_byte_size=A.nbytes,
    )
    message = request.SerializeToString()
    assert decoder.decode(message)[1] == [A.tobytes()]
    memory.regions["r"] = bytearray((2 * A).tobytes())
    assert decoder.decode(message)[1] == [(2 * A).tobytes()]
    del memory.regions["r"]
    with pytest.raises(UnknownRegion):
        decoder.decode(message)


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ({"shared_memory_region": "r"}, "shared_memory_byte_size is missing"),
        ({"shared_memory_byte_size": 16}, "shared_memory_region is missing"),
        ({"shared_memory_region": 1, "shared_memory_byte_size": 16}, "expected a string"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": "16"}, "expected an integer"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": -1}, "at least 0"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": 16, "shared_memory_offset": -1}, "at least 0"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": 12}, "takes 16 bytes, got 12"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": 16, "shared_memory_key": "k"}, "not supported"),
        ({"sequence_id": 1}, "not supported"),
    ],
)
def test_a_place_that_cannot_be_is_refused(place: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        ask(shared(**place), Memory(r=bytes(64)))


def test_elements_come_from_one_source_only() -> None:
    both = shared()
    both.inputs[1].contents.fp32_contents.extend(A.ravel().tolist())
    with pytest.raises(InvalidRequest, match="expected contents or shared memory, got both"):
        ask(both, Memory(r=A.tobytes()))
    too_many = shared()
    too_many.raw_input_contents.append(A.tobytes())
    with pytest.raises(InvalidRequest, match="2 raw_input_contents for 1 inputs"):
        ask(too_many, Memory(r=A.tobytes()))


def test_typed_contents_may_stand_beside_shared_memory() -> None:
    request = shared(raw_of_b=False)
    request.inputs.add(name="b", datatype="INT64", shape=B.shape).contents.int64_contents.extend(B.tolist())
    assert ask(request, Memory(r=A.tobytes()))[1] == [A.tobytes(), B.tobytes()]


def test_no_more_is_copied_than_the_server_takes() -> None:
    rows = 200
    request = made.message([("b", np.arange(rows))])
    entry = request.inputs.add(name="a", datatype="FP32", shape=(rows, 2))
    put(entry, shared_memory_region="r", shared_memory_byte_size=rows * 8)
    with pytest.raises(TooLarge, match="1600 bytes, the limit is 1000"):
        ask(request, Memory(r=bytes(rows * 8)))


def test_text_in_shared_memory_is_checked_element_by_element() -> None:
    words = made.signature(inputs=(made.tensor("t", "BYTES", -1),))
    request = made.message([])
    entry = request.inputs.add(name="t", datatype="BYTES", shape=(1,))
    put(entry, shared_memory_region="r", shared_memory_byte_size=8)
    good = Decoder(Models(words), 1 << 20, Memory(r=b"\4\0\0\0four"))
    assert good.decode(request.SerializeToString())[1] == [b"\4\0\0\0four"]
    bad = Decoder(Models(words), 1 << 20, Memory(r=b"\5\0\0\0four"))
    with pytest.raises(InvalidRequest, match="claims 5 bytes"):
        bad.decode(request.SerializeToString())


def test_without_regions_shared_memory_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="turned off"):
        ask(shared())


# -- outputs -----------------------------------------------------------------------------------------------------------


def wanting(**outputs: dict[str, Any]) -> Any:
    request = made.message([("a", A), ("b", B)])
    for name, values in outputs.items():
        put(request.outputs.add(name=name), **values)
    return request


Y = np.array([[0.5, 2.5, 1], [3, -1, 3]], np.float32)
Z = np.array([b"one", b"two"], object)


def answer(request: Any, arrays: list[NDArray[Any]], memory: Memory | None = None) -> Any:
    header, _ = ask(request, memory)
    assert header.response_options is not None
    return protocol.ModelInferResponse.FromString(encode_with_options(header, b"", header.response_options, arrays))


def test_a_plain_request_wishes_nothing() -> None:
    assert ask(wanting(y={}, z={"binary_data": True}))[0].response_options is None
    assert ask(wanting(y={"classification": 0}))[0].response_options is None


def test_classes_come_with_value_and_index() -> None:
    response = answer(wanting(y={"classification": 2}), [Y])
    (output,) = response.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("y", "BYTES", [2, 2])
    _, (found,) = made.read(response.SerializeToString())
    assert found.tolist() == [[b"2.500000:1", b"1.000000:2"], [b"3.000000:0", b"3.000000:2"]]


def labelled(datatype: str, *labels: str) -> TensorSpec:
    return TensorSpec("y", protocol.DATATYPES[datatype], (-1, 3), labels)


def test_labels_stand_behind_the_index_where_there_are_any() -> None:
    found = classify(Y, labelled("FP32", "cat", "dog"), 3, True)
    assert found[0].tolist() == [b"2.500000:1:dog", b"1.000000:2", b"0.500000:0:cat"]


@pytest.mark.parametrize("datatype", ["INT8", "UINT8", "INT64", "UINT64", "FP64", "FP16", "FP32"])
def test_the_largest_come_first_whatever_the_datatype(datatype: str) -> None:
    dtype = protocol.DATATYPES[datatype].numpy
    assert dtype is not None
    lowest = np.finfo(dtype).min if dtype.kind == "f" else np.iinfo(dtype).min
    found = classify(np.array([[1, 7, lowest, 7]], dtype), labelled(datatype), 4, True)
    assert [int(text.split(b":")[1]) for text in found[0]] == [1, 3, 0, 2]


def test_bfloat16_is_compared_as_the_number_it_is() -> None:
    bits = (np.array([[-1.5, 2, 1]], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    assert classify(bits, labelled("BF16"), 1, True).tolist() == [[b"2.000000:1"]]
    assert classify(bits, labelled("BF16"), 3, True)[0, 2] == b"-1.500000:0"


def test_nan_comes_last_and_more_classes_than_there_are_give_all() -> None:
    found = classify(np.array([[np.nan, 1, -np.inf]], np.float32), labelled("FP32"), 10, True)
    assert found.tolist() == [[b"1.000000:1", b"nan:0", b"-inf:2"]]


def test_every_element_of_a_row_is_a_class_and_an_array_that_is_no_batch_is_one_row() -> None:
    cube = np.arange(12, dtype=np.int32).reshape(2, 2, 3)
    assert classify(cube, labelled("INT32"), 1, True).tolist() == [[b"5:5"], [b"11:5"]]
    assert classify(cube, labelled("INT32"), 2, False).tolist() == [b"11:11", b"10:10"]
    assert classify(np.zeros((0, 3), np.int32), labelled("INT32"), 2, True).shape == (0, 2)


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        ({"z": {"classification": 1}}, "it is of BYTES"),
        ({"y": {"classification": -1}}, "at least 1"),
        ({"y": {"classification": "1"}}, "expected an integer"),
        (
            {"y": {"classification": 1, "shared_memory_region": "r", "shared_memory_byte_size": 9}},
            "classification or shared memory, got both",
        ),
        ({"y": {"sequence_id": 1}}, "not supported"),
        ({"y": {"binary_data": False}, "z": {"binary_data": True}}, "the same for every output"),
        ({"h": {"binary_data": False}}, "FP16 travels in raw_output_contents only"),
    ],
)
def test_an_output_that_cannot_be_sent_so_is_refused(outputs: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        ask(wanting(**outputs), Memory(r=bytes(64)))


def test_typed_contents_come_where_raw_ones_are_not_wanted() -> None:
    request = wanting(y={}, z={})
    put(request, binary_data_output=False)
    response = answer(request, [Y, Z])
    assert not response.raw_output_contents
    assert response.outputs[0].contents.fp32_contents == Y.ravel().tolist()
    assert list(response.outputs[1].contents.bytes_contents) == [b"one", b"two"]
    classes = answer(wanting(y={"classification": 1, "binary_data": False}), [Y])
    assert list(classes.outputs[0].contents.bytes_contents) == [b"2.500000:1", b"3.000000:0"]


def test_an_output_is_written_to_its_region_and_keeps_its_place_among_the_raw_ones() -> None:
    memory = Memory(r=bytes(40))
    place = {"shared_memory_region": "r", "shared_memory_byte_size": 30, "shared_memory_offset": 4}
    response = answer(wanting(y=place, z={}), [Y, Z], memory)
    assert memory.regions["r"] == bytes(4) + Y.tobytes() + bytes(12)
    said = response.outputs[0].parameters
    assert said["shared_memory_region"].string_param == "r"
    assert said["shared_memory_byte_size"].int64_param == Y.nbytes
    assert said["shared_memory_offset"].int64_param == 4
    assert list(response.raw_output_contents) == [b"", made.raw(Z)]


def test_an_output_larger_than_its_window_is_an_error_and_nothing_is_written() -> None:
    memory = Memory(r=bytes(40))
    request = wanting(y={"shared_memory_region": "r", "shared_memory_byte_size": 23})
    with pytest.raises(InvalidRequest, match="has 24 bytes, and its window of shared memory has 23"):
        answer(request, [Y], memory)
    assert memory.regions["r"] == bytes(40)


def test_a_request_that_cannot_be_answered_as_it_wishes_does_not_hurt_its_neighbours() -> None:
    from forwardpass.inference.batch_runner import BatchRunner

    found = made.signature()
    target = made.Target(found)
    window = MemoryWindow(Memory(r=b"1"), RegionRange("r", 0, 1))
    requests = [made.request_for(target, [A]) for _ in range(3)]
    requests[1].template.response_options = ResponseOptions((OutputOptions(window=window),))
    failures: list[RequestError] = []
    runner = BatchRunner(SimpleNamespace(own_thread=False), found, 64, True)  # type: ignore[arg-type]  # nothing is run here
    first, second, third = runner.scatter(requests, [np.concatenate([A, 2 * A, 3 * A])], (0,), failures)
    assert isinstance(second, InvalidRequest) and failures == [second]
    assert isinstance(first, bytes) and isinstance(third, bytes)
    assert np.array_equal(made.read(first)[1][0], A) and np.array_equal(made.read(third)[1][0], 3 * A)
