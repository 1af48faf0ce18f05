"""The protocol's messages as JSON, as its REST form and Triton's have them: the fields' own names, 64-bit integers as
numbers, enumerations by name. Pure.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sized
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from forwardpass.errors import InvalidRequest, printable

INT64_LIMIT = 1 << 63
UINT64_LIMIT = 1 << 64
MOST_ENTRIES = 1024  # of a list of tensors, or of an object of parameters


def to_json(message: Any) -> dict[str, Any]:
    """A message as a dict. Fields that are not set have their defaults, except messages and members of a oneof."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        optional = field.message_type is not None or field.containing_oneof is not None
        if optional and not _repeated(field) and not message.HasField(field.name):
            continue
        found[field.name] = _value(field, getattr(message, field.name))
    return found


def _repeated(field: Any) -> bool:
    repeated = getattr(field, "is_repeated", None)  # protobuf 6.31 and later, where `label` warns
    return bool(field.label == FieldDescriptor.LABEL_REPEATED if repeated is None else repeated)


def _value(field: Any, value: Any) -> Any:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        entry = kind.fields_by_name["value"]
        return {str(key): _single(entry, value[key]) for key in sorted(value)}
    return [_single(field, v) for v in value] if _repeated(field) else _single(field, value)


def _single(field: Any, value: Any) -> Any:
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return value if known is None else known.name
    if field.type == FieldDescriptor.TYPE_BYTES:
        return base64.b64encode(value).decode()
    if field.message_type is None:
        return value
    choices = field.message_type.oneofs_by_name.get("parameter_choice")
    if choices is not None:  # one value under whatever type: just the value
        chosen = value.WhichOneof("parameter_choice")
        return None if chosen is None else _single(field.message_type.fields_by_name[chosen], getattr(value, chosen))
    return to_json(value)


def write_parameters(given: Any, parameters: Any, where: str) -> None:
    """Write a JSON object of parameters to a map of InferParameter. Raises InvalidRequest naming what can't be one."""
    for key, value, what in _entries(given, where):
        if isinstance(value, float):
            parameters[key].double_param = value
        elif isinstance(value, int) and INT64_LIMIT <= value < UINT64_LIMIT:
            parameters[key].uint64_param = value
        elif not _write_common(value, parameters[key], what):
            raise InvalidRequest(f"{what}: expected a number, a string or a boolean, got {_shown(value)}")


def write_repository_parameters(given: Any, parameters: Any) -> None:
    """Write the parameters of a load or unload; a file's contents (`file:…`) are in base64, as Triton's clients send.

    Raises InvalidRequest naming what can't be one.
    """
    for key, value, what in _entries(given, "request"):
        if key.startswith("file:"):
            try:
                parameters[key].bytes_param = base64.b64decode(value, validate=True)
            except (ValueError, TypeError):
                raise InvalidRequest(f"{what}: expected a file's contents in base64") from None
        elif not _write_common(value, parameters[key], what):
            raise InvalidRequest(f"{what}: expected a whole number, a string or a boolean, got {_shown(value)}")


def _entries(given: Any, where: str) -> Iterator[tuple[str, Any, str]]:
    """Key, value and what to call it in an error, for each entry of an object of parameters."""
    if not isinstance(given, dict):
        raise InvalidRequest(f"{where}: expected an object of parameters, got {_shown(given)}")
    bounded(given, where)
    for key, value in given.items():
        what = f"{where}: parameter '{printable(key)}'"
        yield text_field(key, what), value, what


def _write_common(value: Any, parameter: Any, what: str) -> bool:
    """Write a value of a type that every kind of parameter has. Returns whether it is one."""
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int) and -INT64_LIMIT <= value < INT64_LIMIT:
        parameter.int64_param = value
    elif isinstance(value, str):
        parameter.string_param = _text(value, what)
    else:
        return False
    return True


def bounded(given: Sized, where: str) -> None:
    """Raises InvalidRequest for more entries than anything here can mean."""
    if len(given) > MOST_ENTRIES:
        raise InvalidRequest(f"{where}: expected at most {MOST_ENTRIES} entries, got {len(given)}")


def text_field(given: Any, where: str) -> str:
    """`given` if it is a string that a message can hold. Raises InvalidRequest if not."""
    if not isinstance(given, str):
        raise InvalidRequest(f"{where}: expected a string, got {_shown(given)}")
    return _text(given, where)


def whole_number(given: Any, where: str, limit: int = INT64_LIMIT) -> int:
    """`given` if it is a whole number of 0 or more, below `limit`. Raises InvalidRequest if not."""
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < limit:
        raise InvalidRequest(f"{where}: expected a whole number of at least 0, below {limit}, got {_shown(given)}")
    return given


def _text(value: str, where: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(f"{where}: a string has half of a surrogate pair") from None
    return value


def _shown(value: Any) -> str:
    return printable(json.dumps(value), 40)
