"""Stacks rows to one matrix X [B, ...], and converts between arrays and raw contents. Pure; copies once each way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import InvalidRequest
from forwardpass.model.signature import TensorSpec
from forwardpass.protocol.bytes_tensors import are_text, ends, pack, unpack

Buffer = bytes | memoryview
_JOINED = 8192  # bytes per buffer; below this, joining all (a second copy) is faster than copying one by one


def stack(tensor: TensorSpec, buffers: Sequence[Buffer], shape: tuple[int, ...]) -> NDArray[Any]:
    """The array of `shape` ([B, ...]) with the rows of `buffers` (C order, little-endian), one after the other.

    A single buffer is not copied. The array may be read-only.
    """
    if tensor.datatype.numpy is None:
        found = np.empty(math.prod(shape), object)
        found[:] = [e for b in buffers for e in elements(b, tensor.name)]
        return found.reshape(shape)
    data = buffers[0] if len(buffers) == 1 else b"".join(buffers)
    return np.frombuffer(data, dtype=tensor.datatype.numpy).reshape(shape)


def stack_into(buffers: Sequence[Buffer], room: NDArray[Any]) -> None:
    """Copy the rows of `buffers` (C order, little-endian), one after the other, into `room`, which they must fill.

    `room`: [B, ...] of fixed-size elements, at least one, in C order. Raises ValueError if they don't fill it.
    """
    memory = room.data.cast("B")
    if len(buffers) == 1:
        memory[:] = buffers[0]
    elif len(memory) < _JOINED * len(buffers):
        memory[:] = b"".join(buffers)
    else:
        start = 0
        for buffer in buffers:
            end = start + len(buffer)
            memory[start:end] = buffer
            start = end
        if start != len(memory):
            raise ValueError(f"expected {len(memory)} bytes of rows, got {start}")


def raw(array: NDArray[Any]) -> bytes:
    """The array's elements as raw contents: C order, little-endian; each BYTES element after its length."""
    if array.dtype == object:
        return pack(e if isinstance(e, bytes) else str(e).encode() for e in array.ravel())
    return array.tobytes()


def check_elements(data: Buffer, name: str, expected: int) -> None:
    """Check that BYTES raw contents are `expected` texts, without making any.

    Raises InvalidRequest if a length reaches beyond the end, if the count is not `expected`, or if an element is not
    UTF-8 (the only text that ONNX Runtime's string tensors accept).
    """
    try:
        stops = ends(data, expected)
    except ValueError as error:
        raise InvalidRequest(f"input '{name}': {error}") from None
    if len(stops) != expected:
        got = f"more than {expected}" if len(stops) > expected else str(len(stops))
        raise InvalidRequest(f"input '{name}': expected {expected} elements, got {got}")
    if not are_text(data, stops):
        elements(data, name)  # raises, naming the element


def elements(data: Buffer, name: str) -> list[str]:
    """BYTES raw contents as strings. Raises InvalidRequest as `check_elements`."""
    try:
        return [str(element, "utf-8") for element in unpack(data)]
    except UnicodeDecodeError:
        raise InvalidRequest(f"input '{name}': element {_first_not_text(data)} is not UTF-8") from None
    except ValueError as error:
        raise InvalidRequest(f"input '{name}': {error}") from None


def _first_not_text(data: Buffer) -> int:
    for i, element in enumerate(unpack(data)):
        try:
            element.decode()
        except UnicodeDecodeError:
            return i
    raise AssertionError("every element is text")
