"""Tensors in JSON: every element comes back as it was, and what is no element is refused by name."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from forwardpass.errors import InvalidRequest
from forwardpass.protocol import DATATYPES
from forwardpass.protocol.json_tensors import datatype_of, decode, encode, loads

NUMBERS = [d for d in DATATYPES.values() if d.numpy is not None and not d.as_bits]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


@pytest.mark.parametrize("datatype", NUMBERS, ids=lambda d: d.name)
@given(data=st.data())
def test_numbers_come_back_bit_for_bit(datatype: Any, data: st.DataObject) -> None:
    assert datatype.numpy is not None
    array = data.draw(hnp.arrays(datatype.numpy, SHAPES))
    nan = np.isnan(array) if array.dtype.kind == "f" else np.zeros(array.shape, bool)
    text = encode(array.tobytes(), datatype, "y")
    flat = loads(text)
    nested = np.array(flat, object).reshape(array.shape).tolist()
    for written in (flat, nested):
        raw = decode(written, datatype, array.shape, "x")
        read = np.frombuffer(raw, datatype.numpy).reshape(array.shape)
        assert np.array_equal(np.isnan(read) if array.dtype.kind == "f" else nan, nan)
        assert read[~nan].tobytes() == array[~nan].tobytes()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_a_float32_has_the_shortest_digits(values: list[float]) -> None:
    text = encode(np.array(values, np.float32).tobytes(), DATATYPES["FP32"], "y")
    for digits, value in zip(text.decode().strip("[]").split(","), values, strict=True):
        assert np.float32(digits) == np.float32(value)
        significant = digits.lower().split("e")[0].replace(".", "").replace("-", "").strip("0")
        assert len(significant) <= 9


def test_numbers_that_json_has_not_stand_bare() -> None:
    values = [0.1, math.nan, math.inf, -math.inf, 2.5]
    text = encode(np.array(values, np.float32).tobytes(), DATATYPES["FP32"], "y")
    assert text == b"[0.1,NaN,Infinity,-Infinity,2.5]"
    assert str(json.loads(text)) == str([0.1, math.nan, math.inf, -math.inf, 2.5])
    assert decode(loads(text), DATATYPES["FP32"], [5], "x") == np.array(values, np.float32).tobytes()


def test_half_floats_are_numbers_too() -> None:
    ones = np.array([1.0, -2.5, 0.1], np.float16)
    assert decode([1.0, -2.5, 0.1], DATATYPES["FP16"], [3], "x") == ones.tobytes()
    # 1.00390625 lies between two bfloat16, halfway: to the even one.
    raw = decode([1.0, -2.5, 1.00390625, 1.01171875, math.nan], DATATYPES["BF16"], [5], "x")
    assert np.frombuffer(raw, np.uint16)[:4].tolist() == [0x3F80, 0xC020, 0x3F80, 0x3F82]
    assert loads(encode(raw, DATATYPES["BF16"], "y"))[:2] == [1.0, -2.5]
    assert math.isnan(loads(encode(raw, DATATYPES["BF16"], "y"))[4])


@given(st.lists(st.text()))
def test_text_comes_back(words: list[str]) -> None:
    raw = decode(words, DATATYPES["BYTES"], [len(words)], "x")
    assert loads(encode(raw, DATATYPES["BYTES"], "y")) == words


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="output 'y' is not UTF-8 text: ask for it as binary data"):
        encode(b"\x01\x00\x00\x00\xff", DATATYPES["BYTES"], "y")


@pytest.mark.parametrize(
    ("data", "datatype", "shape", "text"),
    [
        ([1.5], "INT32", [1], "input 'x': INT32 takes whole numbers, got 1.5"),
        ([True], "INT64", [1], "INT64 takes whole numbers, got true"),
        ([True], "FP32", [1], "FP32 takes numbers, got true"),
        ([2], "BOOL", [1], "BOOL takes true or false, got 2"),
        ([None], "FP32", [1], "FP32 takes numbers, got null"),
        ([{"a": 1}], "FP32", [1], "FP32 takes numbers"),
        ([1], "BYTES", [1], "BYTES takes strings, got 1"),
        ([300], "UINT8", [1], "300 is not in the range of UINT8"),
        ([1, -1], "UINT64", [2], "-1 is not in the range of UINT64"),
        ([2**63], "INT64", [1], "9223372036854775808 is not in the range of INT64"),
        ([1e39], "FP32", [1], r"1e\+39 is not in the range of FP32"),
        ([70000.0], "FP16", [1], "70000.0 is not in the range of FP16"),
        ([10**400], "FP64", [1], "is not in the range of FP64"),
        ([1, 2], "FP32", [3], r"shape \[3\] has 3 elements, got 2 in data"),
        ([[1, 2], [3]], "FP32", [2, 2], r"expected data nested as shape \[2, 2\], or in one flat list"),
        ([[1, 2, 3]], "FP32", [3, 1], "expected data nested as shape"),
        ([[1], 2], "FP32", [2, 1], "expected data nested as shape"),
        ([[[1]]], "FP32", [1, 1], "FP32 takes numbers"),
        ("text", "FP32", [1], "FP32 takes numbers"),
    ],
)  # fmt: skip
def test_what_is_no_element_is_refused_by_name(data: Any, datatype: str, shape: list[int], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        decode(data, DATATYPES[datatype], shape, "x")


@pytest.mark.parametrize("body", [b"", b"{", b'{"a":NaN', b"[" * 100_000 + b"NaN", b'"\xff"', b"[1e400]", b"\x00"])
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="the body is not JSON"):
        loads(body)


@pytest.mark.parametrize("name", [None, 7, "FP31", ["FP32"], "fp32"])
def test_an_unknown_datatype_is_refused(name: Any) -> None:
    with pytest.raises(InvalidRequest, match="expected a datatype of BOOL"):
        datatype_of(name, "x")
