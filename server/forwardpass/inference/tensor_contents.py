"""Checks one input's datatype and shape against the model's, and gives its elements as raw bytes. Pure.

A mismatch raises InvalidRequest, naming the input, what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from forwardpass import protocol
from forwardpass.errors import InvalidRequest, printable
from forwardpass.execution.stacking import Buffer, check_elements
from forwardpass.model.signature import TensorSpec
from forwardpass.protocol.bytes_tensors import pack
from forwardpass.protocol.request_messages import InputTensor
from forwardpass.protocol.wire import LENGTH, varint

# The length-delimited tags, by name, of fields whose elements are packed as in raw contents.
_PACKED_RAW = {
    name: varint(protocol.InferTensorContents.DESCRIPTOR.fields_by_name[name].number << 3 | LENGTH)
    for name in ("fp32_contents", "fp64_contents")
}
# The element types of fields that carry narrower datatypes.
_CARRIERS = {"int_contents": np.dtype(np.int64), "uint_contents": np.dtype(np.uint64)}
_FEW = 64  # elements; below this, iterating is faster than having protobuf make an array
MOST_TEXTS = 1 << 20  # elements of an input of BYTES: each becomes an object, which takes half a microsecond
ELEMENT_LIMIT = 1 << 40  # product of a tensor's sizes other than 0; a larger tensor can't be sent anyway


def shape_of(given: InputTensor, expected: TensorSpec) -> tuple[int, ...]:
    """The shape of an InferInputTensor, after checking its datatype and sizes against the model's tensor."""
    name = expected.name
    if given.datatype != expected.datatype.name:
        raise InvalidRequest(
            f"input '{name}': expected datatype {expected.datatype.name}, got '{printable(given.datatype)}'"
        )
    shape = tuple(given.shape[:])
    if len(shape) != len(expected.shape):
        raise InvalidRequest(
            f"input '{name}': expected {len(expected.shape)} dimensions {_show(expected.shape)}, got {_show(shape)}"
        )
    for got, want in zip(shape, expected.shape, strict=True):
        if got < 0:
            raise InvalidRequest(f"input '{name}': expected sizes of at least 0, got {_show(shape)}")
        if got != want and want >= 0:
            raise InvalidRequest(f"input '{name}': expected shape {_show(expected.shape)}, got {_show(shape)}")
    if expected.datatype.numpy is None and math.prod(shape) > MOST_TEXTS:
        raise InvalidRequest(
            f"input '{name}': {_show(shape)} has {math.prod(shape)} elements of BYTES, the limit is {MOST_TEXTS}; send "
            "fewer rows in a request"
        )
    if not 0 < math.prod(shape) <= ELEMENT_LIMIT and math.prod([s or 1 for s in shape]) > ELEMENT_LIMIT:
        # 0 x 2**62 is empty, but not a valid array shape
        raise InvalidRequest(f"input '{name}': the sizes of {_show(shape)} are out of range")
    return shape


def _show(shape: Sequence[int]) -> str:
    return "[" + ",".join(str(s) for s in shape[:16]) + (",…" if len(shape) > 16 else "") + "]"


def check(buffer: Buffer, tensor: TensorSpec, shape: tuple[int, ...]) -> None:
    """Check that raw contents are the elements of `shape`."""
    if tensor.datatype.numpy is None:
        check_elements(buffer, tensor.name, math.prod(shape))
    else:
        check_size(len(buffer), tensor, shape)


def check_size(nbytes: int, tensor: TensorSpec, shape: tuple[int, ...]) -> None:
    expected = math.prod(shape) * tensor.datatype.itemsize
    if nbytes != expected:
        raise InvalidRequest(
            f"input '{tensor.name}': shape {_show(shape)} of {tensor.datatype.name} takes {expected} bytes, "
            f"got {nbytes}"
        )


def typed(given: InputTensor, tensor: TensorSpec, shape: tuple[int, ...]) -> bytes:
    """Typed contents as raw bytes. Values must be in the datatype's own field and within its range."""
    datatype = tensor.datatype
    count = math.prod(shape)
    if datatype.contents in _PACKED_RAW:
        # The elements are packed as in raw contents, so they are cut out without reading any.
        data: bytes = given.contents.SerializeToString()
        nbytes = count * datatype.itemsize
        start = len(data) - nbytes
        if nbytes and data[:start] == _PACKED_RAW[datatype.contents] + varint(nbytes):
            return data[start:]
    filled = [field.name for field, _ in given.contents.ListFields()]
    if datatype.contents is None:
        if filled or count:
            raise InvalidRequest(f"input '{tensor.name}': {datatype.name} travels in raw_input_contents only")
        return b""
    wrong = [name for name in filled if name != datatype.contents]
    if wrong:
        raise InvalidRequest(
            f"input '{tensor.name}': {datatype.name} travels in {datatype.contents}, got {', '.join(wrong)}"
        )
    values = getattr(given.contents, datatype.contents)
    if len(values) != count:
        raise InvalidRequest(
            f"input '{tensor.name}': shape {_show(shape)} has {count} elements, got {len(values)} in "
            f"{datatype.contents}"
        )
    if datatype.numpy is None:
        packed = pack(values)
        check_elements(packed, tensor.name, count)
        return packed
    dtype = _CARRIERS.get(datatype.contents, datatype.numpy)
    wide = np.fromiter(values, dtype, count) if count < _FEW else np.array(values, dtype)
    if dtype is datatype.numpy:
        return wide.tobytes()
    narrow = wide.astype(datatype.numpy)
    if not (wide == narrow).all():
        worst = wide[np.argmax(wide != narrow)]
        raise InvalidRequest(f"input '{tensor.name}': {worst} is not in the range of {datatype.name}")
    return narrow.tobytes()
