"""Rows to a matrix and back: nothing is lost, moved or reinterpreted on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.made import raw as raw_of
from tests.unit.made import tensor

from forwardpass import protocol
from forwardpass.errors import InvalidRequest
from forwardpass.execution.stacking import elements, raw, stack, stack_into
from forwardpass.protocol.bytes_tensors import pack

FIXED = [d for d in protocol.DATATYPES.values() if d.numpy is not None]


@pytest.mark.parametrize("datatype", FIXED, ids=lambda d: d.name)
@pytest.mark.parametrize("counts", [(1,), (3, 1), (0, 2, 0, 5), (0,)])
def test_rows_stand_one_after_the_other(datatype: protocol.Datatype, counts: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    assert datatype.numpy is not None
    limit = 2 if datatype.name == "BOOL" else 100
    parts = [rng.integers(0, limit, (count, 2, 3)).astype(datatype.numpy) for count in counts]
    x = stack(tensor("x", datatype.name, -1, 2, 3), [p.tobytes() for p in parts], (sum(counts), 2, 3))
    assert x.dtype == datatype.numpy
    assert np.array_equal(x, np.concatenate(parts))
    assert raw(x) == b"".join(p.tobytes() for p in parts)


@settings(max_examples=50)
@given(st.lists(st.lists(st.text(max_size=4), max_size=5), min_size=1, max_size=4))
def test_text_survives_the_way_there_and_back(parts: list[list[str]]) -> None:
    buffers = [pack(word.encode() for word in words) for words in parts]
    everything = [word for words in parts for word in words]
    x = stack(tensor("x", "BYTES", -1), buffers, (len(everything),))
    assert x.tolist() == everything
    assert raw(x) == b"".join(buffers)


@pytest.mark.parametrize("datatype", FIXED, ids=lambda d: d.name)
@pytest.mark.parametrize("counts", [(1,), (3, 1), (2, 0, 5), (600, 900)], ids=str)
def test_rows_are_copied_to_where_a_device_takes_them_from(
    datatype: protocol.Datatype, counts: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    limit = 2 if datatype.name == "BOOL" else 100
    parts = [rng.integers(0, limit, (count, 2, 30)).astype(datatype.numpy) for count in counts]
    larger = np.zeros((sum(counts) + 2, 2, 30), datatype.numpy)
    room = larger[: sum(counts)]
    stack_into([memoryview(p.tobytes()) if i % 2 else p.tobytes() for i, p in enumerate(parts)], room)
    assert np.array_equal(room, np.concatenate(parts)) and not larger[sum(counts) :].any()


@pytest.mark.parametrize("buffers", [[b"1234"], [b"12", b"34"], [bytes(9000)] * 3, [bytes(9000)] * 5])
def test_rows_that_do_not_fill_their_place_are_an_error(buffers: list[bytes]) -> None:
    for size in (8, 36_000):
        with pytest.raises(ValueError, match=r"."):
            stack_into(buffers, np.zeros((1, size), np.uint8))


def test_a_single_buffer_is_not_copied() -> None:
    data = bytes(np.arange(6, dtype="<f4").tobytes())
    assert np.shares_memory(stack(tensor("x", "FP32", -1, 2), [data], (3, 2)), np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("offset", range(1, 8))
def test_a_view_into_a_message_may_start_anywhere(offset: int) -> None:
    x = np.random.default_rng(offset).standard_normal((4, 3))
    message = b"#" * offset + x.tobytes()
    one = stack(tensor("x", "FP64", -1, 3), [memoryview(message)[offset:]], (4, 3))
    two = stack(tensor("x", "FP64", -1, 3), [memoryview(message)[offset:], x.tobytes()], (8, 3))
    assert np.array_equal(one, x) and np.array_equal(two, np.concatenate([x, x]))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float32).reshape(4, 6).T,
        np.arange(24, dtype=np.float32).reshape(4, 6)[::2, 1::2],
    ],
    ids=["transposed", "strided"],
)
def test_raw_contents_are_in_c_order(array: Any) -> None:
    assert raw(array) == b"".join(element.tobytes() for element in array.ravel(order="C"))


def test_bytes_and_text_of_an_answer_are_packed_alike() -> None:
    assert raw(np.array(["é", b"\xff", ""], object)) == b"\x02\0\0\0\xc3\xa9\x01\0\0\0\xff\0\0\0\0"


def test_an_element_that_is_no_text_is_the_clients_fault() -> None:
    with pytest.raises(InvalidRequest, match="input 'x': element 1 is not UTF-8"):
        elements(raw_of(np.array(["a", "b"], object)).replace(b"b", b"\xff"), "x")
