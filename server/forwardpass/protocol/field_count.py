"""Bounds the number of fields of a serialised message before it is parsed. Pure.

Parsing holds the interpreter, and takes longer than in proportion for maps: a message of 16 MB that is nothing but
small map entries takes protobuf's C library half a minute, in which nothing else of the process runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from forwardpass.errors import InvalidRequest
from forwardpass.protocol import wire
from forwardpass.protocol.messages import InferTensorContents, MessageClass

COUNTED_FROM: Final = 1 << 16  # bytes of a message; a smaller one has too few fields to matter
MOST_FIELDS: Final = 4096  # of a message with all that it contains; a tensor's typed elements are one
DEEPEST: Final = 16  # messages within messages

# Elements are not counted: they are parsed by the million in a few milliseconds.
_NOT_COUNTED = InferTensorContents.DESCRIPTOR.full_name


def check_field_count(message: bytes, kind: MessageClass) -> None:
    """Raises InvalidRequest if a large message has too many fields, or is none of this kind."""
    if len(message) >= COUNTED_FROM:
        try:
            _count(message, 0, len(message), kind.DESCRIPTOR, MOST_FIELDS, DEEPEST)
        except wire.Malformed:
            raise InvalidRequest(f"the message is not a {kind.DESCRIPTOR.name}") from None


def _count(message: bytes, start: int, end: int, descriptor: Any, left: int, depth: int) -> int:
    """The fields that are left of the bound after those of one message. Raises InvalidRequest or Malformed."""
    if not depth:
        raise wire.Malformed
    nested = _messages_in(descriptor)
    for field in wire.fields(message, start, end):
        left -= 1
        if left < 0:
            raise InvalidRequest(
                f"the message has more than {MOST_FIELDS} fields; expected fewer inputs and parameters"
            )
        inner = nested.get(field.number)
        if inner is not None and field.wire_type == wire.LENGTH:
            left = _count(message, field.start, field.end, inner, left, depth - 1)
    return left


@cache
def _messages_in(descriptor: Any) -> Mapping[int, Any]:
    """By field number, the messages that a message contains."""
    return {
        field.number: field.message_type
        for field in descriptor.fields
        if field.message_type is not None and field.message_type.full_name != _NOT_COUNTED
    }
