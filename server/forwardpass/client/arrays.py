"""numpy arrays to the protocol's tensors and back, for a client. Pure: depends on a model's tensors, not on a channel.

An array whose dtype is not the model's is converted only if its values are preserved: floats of another width are
rounded, integers and booleans must convert exactly, floats are never converted to integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass import protocol
from forwardpass.client.errors import Internal, InvalidArgument
from forwardpass.protocol.bytes_tensors import pack, unpack


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One input or output of a model. `shape` has -1 for variable sizes; axis 0 is the batch if the model batches.

    `labels` name the indices of the last axis, in order: an output's classes, an input's columns. `categories` are what
    the values 0, 1, ... of an integer input stand for. Both are empty if the model has none.
    """

    name: str
    datatype: str  # "FP32", "INT64", "BYTES" ...
    shape: tuple[int, ...]
    labels: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()

    @property
    def sizes(self) -> str:
        """The shape as text, with ? for variable sizes."""
        return f"[{','.join('?' if size < 0 else str(size) for size in self.shape)}]"

    def __str__(self) -> str:
        return f"{self.name} {self.datatype}{self.sizes}"


def fit(array: NDArray[Any], tensor: TensorInfo, what: str = "input") -> NDArray[Any]:
    """`array` converted to the dtype of `tensor`; `array` itself if it has it. Shapes are checked by the server.

    BYTES takes arrays of str or bytes; BF16 takes its bits as uint16. Raises InvalidArgument, naming the expected
    dtype, the dtype that came and, if a value does not fit, the value. `what` the tensor is in its text.
    """
    datatype = protocol.DATATYPES.get(tensor.datatype)
    if datatype is None:
        raise InvalidArgument(f"{what} '{tensor.name}' is of datatype {tensor.datatype}, which this client cannot send")
    want = datatype.numpy
    if want is None:  # before any comparison of dtypes: numpy treats None as float64
        if array.dtype.kind in "OUS":
            return array
        raise _unfit(array, tensor, "str or bytes", what)
    if array.dtype == want:
        return array
    if datatype.as_bits:
        if array.dtype.name == "bfloat16":
            return array.view(np.uint16)
        raise _unfit(array, tensor, "its bits as uint16", what)
    have = array.dtype
    if have.kind == "f" and want.kind == "f":
        try:
            with np.errstate(over="raise", under="ignore"):
                return array.astype(want)
        except FloatingPointError:
            with np.errstate(over="ignore"):
                outside = array[np.isinf(array.astype(want)) & np.isfinite(array)]
            raise InvalidArgument(f"{what} '{tensor.name}': {outside[0]} does not fit {tensor.datatype}") from None
    if have.kind not in "biu" or want.kind == "b":
        raise _unfit(array, tensor, str(want), what)
    if have.itemsize < want.itemsize and np.can_cast(have, want, "safe"):
        return array.astype(want)
    return _exactly(array, want, tensor, what)


def _exactly(array: NDArray[Any], want: np.dtype[Any], tensor: TensorInfo, what: str) -> NDArray[Any]:
    """Convert integers to another number type, without changing any value."""
    with np.errstate(over="ignore", invalid="ignore"):
        there = array.astype(want)
        back = there.astype(array.dtype)
    changed = back != array
    if want.kind in "iu":
        changed |= (there < 0) != (array < 0)
    elif array.dtype.kind != "b":
        # The largest integers round up to a power of two out of their range; converting that back is undefined.
        changed |= there.astype(np.float64) >= 2.0 ** (8 * array.dtype.itemsize - (array.dtype.kind == "i"))
    if changed.any():
        raise InvalidArgument(
            f"{what} '{tensor.name}': expected {want} ({tensor.datatype}), got {array.dtype} "
            f"with the value {array[changed].flat[0]}, which {want} cannot hold exactly"
        )
    return there


def _unfit(array: NDArray[Any], tensor: TensorInfo, expected: str, what: str) -> InvalidArgument:
    return InvalidArgument(f"{what} '{tensor.name}': expected {expected} ({tensor.datatype}), got {array.dtype}")


def to_raw(array: NDArray[Any], name: str) -> bytes:
    """The elements as raw contents: row-major, little-endian, each BYTES element after its length. Call after `fit`."""
    if array.dtype.kind not in "OUS":
        return array.tobytes()
    return pack(_encoded(array, name))


def _encoded(array: NDArray[Any], name: str) -> Iterator[bytes]:
    for element in array.ravel().tolist():
        if isinstance(element, str):
            yield element.encode()
        elif isinstance(element, bytes):
            yield element
        else:
            raise InvalidArgument(f"input '{name}': expected str or bytes (BYTES), got {type(element).__name__}")


def from_raw(data: bytes, datatype: str, shape: Sequence[int], name: str) -> NDArray[Any]:
    """Raw contents as a writable copy in an array. Raises Internal if the bytes do not match `shape`.

    BYTES: an object array of str; of bytes, if any element is not UTF-8. BF16: its bits, as uint16.
    """
    known = protocol.DATATYPES.get(datatype)
    if known is None:
        raise Internal(f"output '{name}' came as datatype '{datatype}', which the protocol does not have")
    try:
        if known.numpy is not None:
            return np.frombuffer(data, known.numpy).reshape(shape).copy()
        return _texts(list(unpack(data)), shape)
    except ValueError:
        raise Internal(
            f"output '{name}' came with {len(data)} bytes, which are no {datatype} of shape {list(shape)}"
        ) from None


def from_typed(contents: Any, datatype: str, shape: Sequence[int], name: str) -> NDArray[Any]:
    """As `from_raw`, for a server that sends an InferTensorContents."""
    known = protocol.DATATYPES.get(datatype)
    if known is None or known.contents is None:
        raise Internal(f"output '{name}' came as datatype '{datatype}' without raw contents")
    values = getattr(contents, known.contents)
    try:
        if known.numpy is not None:
            return np.array(values, known.numpy).reshape(shape)
        return _texts(list(values), shape)
    except (ValueError, OverflowError):
        raise Internal(
            f"output '{name}' came with {len(values)} values, which are no {datatype} of shape {list(shape)}"
        ) from None


def _texts(elements: list[bytes], shape: Sequence[int]) -> NDArray[Any]:
    array = np.empty(len(elements), object)
    try:
        array[:] = [element.decode() for element in elements]
    except UnicodeDecodeError:
        array[:] = elements
    return array.reshape(shape)
