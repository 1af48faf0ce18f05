"""Locates a serialized message's fields without decoding them: varints, tags, and tensor offsets. Pure.

For messages that protobuf has parsed already. Encodings that serializers rarely write, such as groups, are unsupported.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # wire types
NAME, VERSION, ID, INPUTS, RAW_INPUTS = 1, 2, 3, 5, 7  # fields of ModelInferRequest
CONTENTS = 5  # field of InferInputTensor
RAW_IN = b"\x3a"  # tag of ModelInferRequest.raw_input_contents (field 7, length-delimited)
RAW_OUT = b"\x32"  # tag of ModelInferResponse.raw_output_contents (field 6, length-delimited)
NAME_TAG, VERSION_TAG, ID_TAG = (number << 3 | LENGTH for number in (NAME, VERSION, ID))

Span = tuple[int, int]  # start and end of a field's content in the message


class Malformed(Exception):
    """Unsupported bytes. They may still be a valid message."""


class Field(NamedTuple):
    number: int
    wire_type: int
    start: int  # of its content
    end: int


def varint(value: int) -> bytes:
    """`value` as a protobuf varint: seven bits per byte, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def fields(data: bytes, start: int, end: int) -> Iterator[Field]:
    """The fields of the message at data[start:end], in order. Raises Malformed."""
    at = start
    while at < end:
        tag, at = _read_varint(data, at, end)
        wire_type = tag & 7
        if wire_type == LENGTH:
            size, at = _read_varint(data, at, end)
        elif wire_type == VARINT:
            size = _read_varint(data, at, end)[1] - at
        elif wire_type == FIXED32:
            size = 4
        elif wire_type == FIXED64:
            size = 8
        else:
            raise Malformed
        stop = at + size
        if stop > end:
            raise Malformed
        yield Field(tag >> 3, wire_type, at, stop)
        at = stop


def _read_varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """The varint at `at`, and the offset after it."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise Malformed


def tensor_spans(message: bytes, start: int) -> list[Span] | None:
    """The spans of the tensors in a ModelInferRequest, from the fields at `start` on, in the message's order.

    None if the bytes around the tensors can't serve as a key for the rest of the message: they contain an id, or a
    tensor's elements are in several fields.
    """
    raws: list[Span] = []
    inputs: list[Field] = []
    try:
        for field in fields(message, start, len(message)):
            if field.number == ID:
                return None
            if field.number in (INPUTS, RAW_INPUTS):
                if field.wire_type != LENGTH:
                    return None
                if field.number == INPUTS:
                    inputs.append(field)
                else:
                    raws.append((field.start, field.end))
        return raws or [_only(message, _only(message, (f.start, f.end), CONTENTS)) for f in inputs]
    except Malformed:
        return None


def _only(message: bytes, span: Span, number: int | None = None) -> Span:
    """The content of the only field (with that number). Raises Malformed if there is not exactly one."""
    # No more than two are looked at: elements that are not packed are a field each, by the million.
    found = list(islice((f for f in fields(message, *span) if number is None or f.number == number), 2))
    if len(found) != 1 or found[0].wire_type != LENGTH:
        raise Malformed
    return found[0].start, found[0].end
