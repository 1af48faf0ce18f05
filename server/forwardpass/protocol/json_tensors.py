"""Tensor elements as JSON has them, to raw contents and back. Pure.

Numbers keep their value: an integer is read as an integer, and a float32 is written with the fewest digits that give
it back. NaN, Infinity and -Infinity stand bare, as Triton writes them and Python's json reads them. FP16 and BF16 are
numbers too; BYTES are strings of UTF-8.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

import numpy as np
import orjson

from forwardpass.errors import InvalidRequest, printable
from forwardpass.protocol import bytes_tensors
from forwardpass.protocol.datatypes import DATATYPES, Datatype

MOST_CONTAINERS: Final = 1 << 20  # lists and objects in a body; brackets in its texts count as well

_NUMBER: Final = {"b": "true or false", "u": "whole numbers", "i": "whole numbers", "f": "numbers"}
_TYPES: Final[dict[str, set[type]]] = {"b": {bool, int}, "u": {int}, "i": {int}, "f": {float, int}}


def loads(body: bytes | memoryview) -> Any:
    """The value of a JSON text. Raises InvalidRequest that says where it is not JSON, or that it has too many lists.

    A list of two bytes takes 64 once it is parsed, and an object more; while they are parsed nothing else runs.
    """
    if len(body) >= MOST_CONTAINERS:
        whole = bytes(body)
        if whole.count(b"[") + whole.count(b"{") > MOST_CONTAINERS:
            raise InvalidRequest(
                f"the body has more than {MOST_CONTAINERS} lists and objects; expected data in flat lists, or binary"
            )
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        text = bytes(body)
        if b"NaN" in text or b"Infinity" in text:  # JSON has no such numbers, and orjson does not read them
            try:
                return json.loads(text)
            except (ValueError, RecursionError):
                pass
        raise InvalidRequest(f"the body is not JSON: {printable(str(error), 160)}") from None


def decode(data: Any, datatype: Datatype, shape: Sequence[int], name: str) -> bytes:
    """The raw contents of a tensor's `data`: its elements in row-major order, in one list or nested as `shape` is.

    Raises InvalidRequest that names the tensor, what was expected and what came.
    """
    values = _flat(data, shape, name)
    if datatype.numpy is None:
        return _packed(values, name)
    kind = "f" if datatype.as_bits else datatype.numpy.kind
    types = set(map(type, values))
    if not types <= _TYPES[kind] or (kind == "b" and not set(values) <= {0, 1}):
        odd = next(v for v in values if type(v) not in _TYPES[kind] or (kind == "b" and v not in (0, 1)))
        raise InvalidRequest(
            f"input '{name}': {datatype.name} takes {_NUMBER[kind]}, got {printable(json.dumps(odd), 40)}"
        )
    if kind == "b":
        return np.array(values, np.bool_).tobytes()
    if kind != "f":
        bounds = np.iinfo(datatype.numpy)
        for value in (min(values), max(values)) if values else ():
            if not bounds.min <= value <= bounds.max:
                raise _out_of_range(datatype, name, value)
        return np.array(values, datatype.numpy).tobytes()
    try:
        wide = np.array(values, np.float64)
    except OverflowError:
        raise _out_of_range(datatype, name, max((v for v in values if type(v) is int), key=abs)) from None
    with np.errstate(over="ignore"):
        if datatype.as_bits:
            return datatype.narrowed(_rounded_to_bfloat16(wide.astype(np.float32))).tobytes()
        narrow = wide.astype(datatype.numpy)
    wrong = np.isinf(narrow) & np.isfinite(wide)
    if wrong.any():
        raise _out_of_range(datatype, name, wide[np.argmax(wrong)].item())
    return narrow.tobytes()


def encode(raw: bytes, datatype: Datatype, name: str) -> bytes:
    """Raw contents as the JSON text of one flat list.

    Raises InvalidRequest for BYTES that are not UTF-8: those can only be sent as binary data.
    """
    if datatype.numpy is None:
        try:
            return orjson.dumps([element.decode() for element in bytes_tensors.unpack(raw)])
        except UnicodeDecodeError:
            raise InvalidRequest(f"output '{name}' is not UTF-8 text: ask for it as binary data") from None
    array = datatype.widened(np.frombuffer(raw, datatype.numpy))
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        # Bare NaN and Infinity, which orjson has no way to write. The shortest digits of the others stay the same.
        digits = orjson.dumps(np.nan_to_num(array), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")
        for place in np.flatnonzero(~np.isfinite(array)).tolist():
            digits[place] = json.dumps(float(array[place])).encode()
        return b"[" + b",".join(digits) + b"]"
    return orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)


def datatype_of(name: Any, tensor: str) -> Datatype:
    """The datatype of this name. Raises InvalidRequest if there is none."""
    found = DATATYPES.get(name) if isinstance(name, str) else None
    if found is None:
        raise InvalidRequest(
            f"input '{tensor}': expected a datatype of {', '.join(DATATYPES)}, got {printable(json.dumps(name), 40)}"
        )
    return found


def _flat(data: Any, shape: Sequence[int], name: str) -> list[Any]:
    """The elements of `data` in row-major order, after checking that there are as many as `shape` has."""
    values: list[Any] = data if isinstance(data, list) else [data]
    if values and isinstance(values[0], list):
        level = values
        for axis, size in enumerate(shape):
            if axis and not (set(map(type, level)) <= {list} and set(map(len, level)) <= {size}):
                raise _not_of_shape(shape, name)
            level = list(chain.from_iterable(level)) if axis else level
            if not axis and len(level) != size:
                raise _not_of_shape(shape, name)
        values = level
    if len(values) != math.prod(shape):
        raise InvalidRequest(
            f"input '{name}': shape {list(shape)} has {math.prod(shape)} elements, got {len(values)} in data"
        )
    return values


def _not_of_shape(shape: Sequence[int], name: str) -> InvalidRequest:
    return InvalidRequest(f"input '{name}': expected data nested as shape {list(shape)}, or in one flat list")


def _packed(values: list[Any], name: str) -> bytes:
    if not set(map(type, values)) <= {str}:
        odd = next(v for v in values if type(v) is not str)
        raise InvalidRequest(f"input '{name}': BYTES takes strings, got {printable(json.dumps(odd), 40)}")
    try:
        return bytes_tensors.pack(value.encode() for value in values)
    except UnicodeEncodeError:
        raise InvalidRequest(f"input '{name}': a string has half of a surrogate pair") from None


def _rounded_to_bfloat16(values: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 values, rounded to even at the bit where bfloat16 ends; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = bits + (((bits >> 16) & 1) + 0x7FFF)
    return np.where(np.isfinite(values), rounded, bits | (np.isnan(values) * np.uint32(0x400000))).view(np.float32)


def _out_of_range(datatype: Datatype, name: str, value: Any) -> InvalidRequest:
    return InvalidRequest(f"input '{name}': {printable(str(value), 40)} is not in the range of {datatype.name}")
