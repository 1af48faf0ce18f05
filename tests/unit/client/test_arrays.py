"""Which arrays become which tensors, exactly, and which are refused by name."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from forwardpass import protocol
from forwardpass.client import Internal, InvalidArgument, TensorInfo
from forwardpass.client.arrays import fit, from_raw, from_typed, to_raw
from forwardpass.execution import stacking
from forwardpass.model.signature import TensorSpec

FIXED = {name: datatype.numpy for name, datatype in protocol.DATATYPES.items() if datatype.numpy is not None}


def tensor(datatype: str) -> TensorInfo:
    return TensorInfo("x", datatype, (-1, 4))


@given(st.data())
def test_an_array_of_the_models_dtype_comes_through_bit_for_bit(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(FIXED)))
    array = data.draw(hnp.arrays(FIXED[name], hnp.array_shapes(min_dims=0, min_side=0)))
    sent = fit(array, tensor(name))
    assert sent is array
    raw = to_raw(sent, "x")
    got = from_raw(raw, name, array.shape, "x")
    assert got.dtype == array.dtype and got.shape == array.shape
    assert got.tobytes() == array.tobytes()
    got[...] = 0  # the caller's own


@given(hnp.arrays(object, hnp.array_shapes(min_side=0), elements=st.text() | st.just("\x00é")))
def test_texts_come_through_and_are_what_the_server_reads(array: np.ndarray) -> None:
    raw = to_raw(fit(array, tensor("BYTES")), "x")
    server_side = TensorSpec("x", protocol.DATATYPES["BYTES"], (-1,) * array.ndim)
    assert stacking.stack(server_side, [raw], array.shape).tolist() == array.tolist()
    assert raw == stacking.raw(array)
    got = from_raw(raw, "BYTES", array.shape, "x")
    assert got.dtype == object and got.tolist() == array.tolist()


def test_bytes_and_fixed_width_texts_are_texts_too() -> None:
    for array in (np.array([b"a", b"bc"]), np.array(["a", "bc"]), np.array(["a", b"bc"], object)):
        assert to_raw(fit(array, tensor("BYTES")), "x") == b"\x01\0\0\0a\x02\0\0\0bc"
    got = from_raw(to_raw(np.array(["a", b"\xff"], object), "x"), "BYTES", (2,), "x")
    assert got.tolist() == [b"a", b"\xff"]  # one that is no UTF-8: all stay bytes
    with pytest.raises(InvalidArgument, match=r"input 'x': expected str or bytes \(BYTES\), got int"):
        to_raw(np.array(["a", 1], object), "x")


@pytest.mark.parametrize(
    ("given_dtype", "datatype"),
    [
        ("f8", "FP32"), ("f8", "FP16"), ("f4", "FP16"), ("f4", "FP64"), ("f2", "FP32"), (">f4", "FP32"),
        (">f8", "FP32"), ("u1", "FP32"), ("i2", "FP32"), ("i8", "FP32"), ("i8", "FP64"), ("u8", "FP32"),
        ("i8", "FP16"), ("?", "FP32"), ("i8", "INT32"), ("i8", "INT8"), ("u8", "INT64"), ("i8", "UINT64"),
        ("u1", "INT64"), (">i4", "INT32"), ("?", "UINT8"),
    ],
)  # fmt: skip
def test_values_that_fit_are_converted(given_dtype: str, datatype: str) -> None:
    array = np.array([[0, 1, 1, 0]], given_dtype)
    got = fit(array, tensor(datatype))
    assert got.dtype == FIXED[datatype]
    np.testing.assert_array_equal(got, array)
    assert to_raw(got, "x") == np.array([[0, 1, 1, 0]], FIXED[datatype]).tobytes()


def test_floats_are_rounded_and_keep_what_is_not_finite() -> None:
    array = np.array([0.1, np.nan, np.inf, -np.inf, 1e-320, -0.0])
    got = fit(array, tensor("FP32"))
    assert got.tobytes() == array.astype(np.float32).tobytes()


@pytest.mark.parametrize(
    ("array", "datatype", "text"),
    [
        (np.array([1.0]), "INT64", r"expected int64 \(INT64\), got float64$"),
        (np.array([1.0]), "BOOL", r"expected bool \(BOOL\), got float64$"),
        (np.array([1]), "BOOL", r"expected bool \(BOOL\), got int64$"),
        (np.array(["1"]), "FP32", r"expected float32 \(FP32\), got <U1$"),
        (np.array([1j]), "FP32", r"expected float32 \(FP32\), got complex128$"),
        (np.array([None]), "FP32", r"expected float32 \(FP32\), got object$"),
        (np.array([1.0]), "BYTES", r"expected str or bytes \(BYTES\), got float64$"),
        (np.array([1.0]), "BF16", r"expected its bits as uint16 \(BF16\), got float64$"),
        (np.array([1, -1]), "UINT8", r"got int64 with the value -1, which uint8 cannot hold"),
        (np.array([1, 256]), "UINT8", r"got int64 with the value 256, which uint8 cannot hold"),
        (np.array([-1]), "UINT64", r"got int64 with the value -1, which uint64 cannot hold"),
        (np.array([2**63], np.uint64), "INT64", r"with the value 9223372036854775808, which int64 cannot hold"),
        (np.array([2**24 + 1]), "FP32", r"with the value 16777217, which float32 cannot hold exactly"),
        (np.array([2**31 - 1], np.int32), "FP32", r"with the value 2147483647, which float32"),
        (np.array([2**63 - 1]), "FP64", r"with the value 9223372036854775807, which float64"),
        (np.array([2**64 - 1], np.uint64), "FP64", r"with the value 18446744073709551615, which float64"),
        (np.array([70000]), "FP16", r"with the value 70000, which float16"),
        (np.array([1e39]), "FP32", r"1e\+39 does not fit FP32"),
        (np.array([1.0]), "FP8", r"is of datatype FP8, which this client cannot send"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(array: np.ndarray, datatype: str, text: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"^INVALID_ARGUMENT: input 'x'.*{text}"):
        fit(array, tensor(datatype))


@given(
    hnp.arrays(hnp.integer_dtypes() | hnp.unsigned_integer_dtypes(), hnp.array_shapes(min_dims=1, max_dims=1)),
    st.data(),
)
def test_integers_are_the_same_number_or_an_error(array: np.ndarray, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for name in FIXED if name not in ("BOOL", "BF16")]))
    try:
        got = fit(array, tensor(name))
    except InvalidArgument:
        # As Python's own numbers, which have no width: at least one does not come back.
        assert any(_through(value, FIXED[name]) != value for value in array.tolist())
    else:
        assert [int(value) for value in got.tolist()] == array.tolist()


def _through(value: int, dtype: np.dtype[Any]) -> float | int | None:
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return value if limits.min <= value <= limits.max else None
    with np.errstate(over="ignore"):
        wide = np.array(value, dtype).item()
    return int(wide) if np.isfinite(wide) else None


@pytest.mark.parametrize(
    ("data", "datatype", "shape"),
    [
        (b"\0" * 7, "FP32", (2,)),
        (b"\0" * 8, "FP32", (3,)),
        (b"\x05\0\0\0a", "BYTES", (1,)),
        (b"\x01\0\0", "BYTES", (1,)),
        (b"\x01\0\0\0a", "BYTES", (2,)),
    ],
)
def test_bytes_that_are_no_such_tensor_are_an_error_of_the_server(
    data: bytes, datatype: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(Internal, match=rf"output 'y' came with {len(data)} bytes, which are no {datatype} of shape"):
        from_raw(data, datatype, shape, "y")
    with pytest.raises(Internal, match="which the protocol does not have"):
        from_raw(data, "FP7", shape, "y")


def test_typed_contents_of_other_servers_are_read() -> None:
    contents = protocol.InferTensorContents(fp32_contents=[1.5, 2.5], int_contents=[-1, 2], bytes_contents=[b"a", b"b"])
    assert from_typed(contents, "FP32", (1, 2), "y").tolist() == [[1.5, 2.5]]
    assert from_typed(contents, "INT8", (2,), "y").dtype == np.int8
    assert from_typed(contents, "BYTES", (2,), "y").tolist() == ["a", "b"]
    for datatype, text in (("FP64", "came with 0 values"), ("FP16", "without raw contents")):
        with pytest.raises(Internal, match=text):
            from_typed(contents, datatype, (2,), "y")


@pytest.mark.skipif(sys.byteorder != "little", reason="the expected bytes are written for a little-endian machine")
def test_a_view_that_is_not_contiguous_is_sent_in_row_order() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    assert to_raw(fit(array, tensor("FP32")), "x") == np.ascontiguousarray(array).tobytes()


def test_a_tensor_prints_as_people_read_it() -> None:
    assert str(TensorInfo("x", "FP32", (-1, 64))) == "x FP32[?,64]"
