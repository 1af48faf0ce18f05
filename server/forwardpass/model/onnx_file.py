"""The part of an ONNX file's graph that moves rows: nodes, attributes, shapes, small integer constants.

Read by walking the protobuf's fields, so that serving needs no `onnx`, and weights are skipped whatever their size. The
field numbers are those of onnx.proto. https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

from forwardpass.errors import ModelError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
MOST_ELEMENTS = 4096  # of a constant whose values are read: shapes, axes and paddings are shorter
DEEPEST = 200  # messages within messages; protobuf itself allows 100
_FLOAT, _INT32, _INT64 = 1, 6, 7  # TensorProto.DataType

Attribute: TypeAlias = "int | float | bytes | tuple[int, ...] | tuple[float, ...] | Constant | OnnxGraph"
Buffer = mmap.mmap | bytes


class FileField(NamedTuple):
    """One field of a message: its number, its value where that is a number, where its bytes are where it is not."""

    number: int
    value: int
    start: int = 0
    stop: int = 0


class Constant(NamedTuple):
    """An initializer or a constant tensor. `values`: of short integer tensors, in C order; None: not read.

    `lead`: the first element of a short tensor of 32-bit floats.
    """

    dims: tuple[int, ...]
    values: tuple[int, ...] | None
    lead: float | None = None


@dataclass(frozen=True, slots=True)
class OnnxNode:
    """One node. Absent optional inputs and outputs are empty names."""

    name: str
    op: str
    domain: str  # empty: ONNX's own
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Attribute]


@dataclass(slots=True)
class OnnxGraph:
    """A graph. Shapes have None where an axis is of any size; a name that is missing has no known shape."""

    nodes: list[OnnxNode] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    inputs: dict[str, tuple[int | None, ...] | None] = field(default_factory=dict)  # without the constants' names
    outputs: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """A model: its main graph, and the version of each domain of operators; "" is ONNX's own."""

    graph: OnnxGraph
    opsets: dict[str, int]


def read_onnx(path: Path) -> OnnxFile:
    """The file's graph. Raises ModelError where it cannot be read or is no ONNX file."""
    try:
        with path.open("rb") as file:
            if not file.seek(0, 2):
                raise ModelError(f"{path.name} is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _model(data)
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror or error}") from None
    except (ValueError, IndexError, struct.error, UnicodeDecodeError):
        raise ModelError(f"{path.name} is not an ONNX file, or was cut short") from None


def fields(data: Buffer, at: int, end: int) -> Iterator[FileField]:
    """Every field of a message that lies from `at` to `end`. Raises ValueError where that is no message."""
    while at < end:
        tag, at = varint(data, at, end)
        number, kind = tag >> 3, tag & 7
        if not number:
            raise ValueError("field number 0")
        if kind == VARINT:
            value, at = varint(data, at, end)
            yield FileField(number, value)
            continue
        if kind == BYTES:
            size, at = varint(data, at, end)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > end:
            raise ValueError("a field ends beyond its message")
        yield FileField(number, 0, at, at + size)
        at += size


def varint(data: Buffer, at: int, end: int) -> tuple[int, int]:
    """(value, where it ends). Raises ValueError where it does not end."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number does not end")


def _model(data: Buffer) -> OnnxFile:
    graph = OnnxGraph()
    opsets: dict[str, int] = {}
    for number, _, start, stop in fields(data, 0, len(data)):
        if number == 7:
            graph = _graph(data, start, stop, 0)
        elif number == 8:
            domain, version = "", 1
            for inner in fields(data, start, stop):
                if inner.number == 1:
                    domain = _text(data, inner)
                elif inner.number == 2:
                    version = inner.value
            opsets["" if domain == "ai.onnx" else domain] = version
    return OnnxFile(graph, opsets)


def _graph(data: Buffer, at: int, end: int, depth: int) -> OnnxGraph:
    if depth > DEEPEST:
        raise ValueError("messages too deep")
    graph = OnnxGraph()
    sparse: list[str] = []
    for entry in fields(data, at, end):
        match entry.number:
            case 1:
                graph.nodes.append(_node(data, entry, depth))
            case 5:
                name, constant = _tensor(data, entry)
                graph.constants[name] = constant
            case 11:
                name, shape = _value_info(data, entry)
                graph.inputs[name] = shape
            case 12:
                name, shape = _value_info(data, entry)
                graph.outputs.append(name)
                if shape is not None:
                    graph.shapes[name] = shape
            case 13:
                name, shape = _value_info(data, entry)
                if shape is not None:
                    graph.shapes[name] = shape
            case 15:  # a sparse initializer: its values are a tensor with its name, and not of its shape
                inside = fields(data, entry.start, entry.stop)
                sparse += [_tensor(data, inner)[0] for inner in inside if inner.number == 1]
    for name in (*graph.constants, *sparse):
        graph.inputs.pop(name, None)
    return graph


def _node(data: Buffer, at: FileField, depth: int) -> OnnxNode:
    texts: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: [], 7: []}
    attributes: dict[str, Attribute] = {}
    for entry in fields(data, at.start, at.stop):
        if entry.number in texts:
            texts[entry.number].append(_text(data, entry))
        elif entry.number == 5:
            name, value = _attribute(data, entry, depth)
            if value is not None:
                attributes[name] = value
    name, op, domain = ("".join(texts[number][-1:]) for number in (3, 4, 7))
    return OnnxNode(name, op, "" if domain == "ai.onnx" else domain, tuple(texts[1]), tuple(texts[2]), attributes)


def _attribute(data: Buffer, at: FileField, depth: int) -> tuple[str, Attribute | None]:
    name, kind = "", 0
    single: Attribute | None = None
    ints: list[int] = []
    floats: list[float] = []
    for entry in fields(data, at.start, at.stop):
        match entry.number:
            case 1:
                name = _text(data, entry)
            case 2:
                (single,) = struct.unpack("<f", data[entry.start : entry.stop])
            case 3:
                single = _signed(entry.value)
            case 4:
                single = data[entry.start : entry.stop]
            case 5:
                single = _tensor(data, entry)[1]
            case 6:
                single = _graph(data, entry.start, entry.stop, depth + 1)
            case 7:
                floats += struct.unpack(f"<{(entry.stop - entry.start) // 4}f", data[entry.start : entry.stop])
            case 8:
                ints += _integers(data, entry)
            case 20:
                kind = entry.value
    if kind == 7:  # INTS, of which none are written where there are none
        return name, tuple(ints)
    if kind == 6:
        return name, tuple(floats)
    if kind == 2 and single is None:
        return name, 0
    return name, tuple(ints) if ints and single is None else single


def _tensor(data: Buffer, at: FileField) -> tuple[str, Constant]:
    name, kind, elsewhere = "", 0, False
    dims: list[int] = []
    values: list[int] = []
    raw: FileField | None = None
    floats: FileField | None = None
    for entry in fields(data, at.start, at.stop):
        match entry.number:
            case 1:
                dims += _integers(data, entry)
            case 2:
                kind = entry.value
            case 5 | 7:
                if entry.stop - entry.start <= 10 * MOST_ELEMENTS:
                    values += _integers(data, entry)
            case 4:
                floats = entry
            case 8:
                name = _text(data, entry)
            case 9:
                raw = entry
            case 13 | 14:
                elsewhere = elsewhere or entry.number == 13 or entry.value == 1
    count = 1
    for dim in dims:
        count *= dim
    found: tuple[int, ...] | None = None
    if kind in (_INT32, _INT64) and count <= MOST_ELEMENTS and not elsewhere:
        if raw is not None and raw.stop > raw.start:
            letter, size = ("i", 4) if kind == _INT32 else ("q", 8)
            if raw.stop - raw.start == count * size:
                found = struct.unpack(f"<{count}{letter}", data[raw.start : raw.stop])
        elif len(values) == count:
            found = tuple(values)
    lead: float | None = None
    if kind == _FLOAT and 0 < count <= MOST_ELEMENTS and not elsewhere:
        at_first = raw if raw is not None and raw.stop > raw.start else floats
        if at_first is not None and at_first.stop - at_first.start == 4 * count:
            (lead,) = struct.unpack_from("<f", data, at_first.start)
    return name, Constant(tuple(dims), found, lead)


def _value_info(data: Buffer, at: FileField) -> tuple[str, tuple[int | None, ...] | None]:
    name = ""
    shape: tuple[int | None, ...] | None = None
    for entry in fields(data, at.start, at.stop):
        if entry.number == 1:
            name = _text(data, entry)
        elif entry.number == 2:
            for kind in fields(data, entry.start, entry.stop):
                if kind.number == 1:  # tensor_type
                    for inner in fields(data, kind.start, kind.stop):
                        if inner.number == 2:
                            shape = _shape(data, inner)
    return name, shape


def _shape(data: Buffer, at: FileField) -> tuple[int | None, ...]:
    dims: list[int | None] = []
    for entry in fields(data, at.start, at.stop):
        if entry.number == 1:
            size = None
            for inner in fields(data, entry.start, entry.stop):
                if inner.number == 1:
                    size = _signed(inner.value)
            dims.append(size if size is not None and size >= 0 else None)
    return tuple(dims)


def _integers(data: Buffer, at: FileField) -> list[int]:
    """A repeated integer's field: one number, or several that are packed."""
    if not at.stop:
        return [_signed(at.value)]
    found = []
    place = at.start
    while place < at.stop:
        value, place = varint(data, place, at.stop)
        found.append(_signed(value))
    return found


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _text(data: Buffer, at: FileField) -> str:
    return data[at.start : at.stop].decode("utf-8", "surrogateescape")
