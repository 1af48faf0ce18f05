"""The `parameters` of a request, of its inputs and of its requested outputs. Pure.

The protocol allows parameters of any name; unknown ones have no effect. Those that would change the response if they
were silently ignored are rejected by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from forwardpass.errors import InvalidRequest, printable
from forwardpass.model.signature import TensorSpec
from forwardpass.protocol.request_messages import Parameter, Parameters

NO_PRIORITY = 0
SHARED = "shared_memory_"
# Prefixes of parameters that are supported nowhere (sequences), or only at another place than where they were found.
REFUSED = ("sequence_", SHARED, "classification")
INTEGERS = ("int64_param", "uint64_param")


class RegionRange(NamedTuple):
    """Where a tensor's bytes are read or written."""

    region: str
    offset: int  # bytes
    nbytes: int


class RegionView(Protocol):
    """A range of a shared-memory region. `read` and `write` raise InvalidRequest once it no longer exists."""

    place: RegionRange

    def read(self) -> bytes: ...
    def write(self, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """How to send one output. `classes`: send that many largest elements of each row instead of the tensor."""

    classes: int = 0
    window: RegionView | None = None  # write the elements there instead of sending them


@dataclass(frozen=True, slots=True)
class ResponseOptions:
    """How to send a response other than plainly. `outputs` are in the order of the template's outputs."""

    outputs: tuple[OutputOptions, ...]
    typed: bool = False  # typed contents instead of raw bytes


class RequestParameters(NamedTuple):
    """The parsed parameters of a request as a whole."""

    priority: int  # NO_PRIORITY: the model's default
    timeout: float  # seconds from arrival; inf: none
    typed: bool


NO_PARAMETERS = RequestParameters(NO_PRIORITY, math.inf, False)


def parse_request_parameters(parameters: Parameters, priority_levels: int) -> RequestParameters:
    """Parse the schedule_policy parameters and `binary_data_output`. Raises InvalidRequest naming what was expected."""
    priority, timeout, typed = NO_PRIORITY, math.inf, False
    for key in parameters:
        parameter = parameters[key]
        if key == "priority":
            priority = _integer(key, parameter)
            if not 0 <= priority <= priority_levels:
                raise InvalidRequest(
                    f"parameter 'priority': expected 1 to {priority_levels}, or 0 for the default, got {priority}"
                )
        elif key == "timeout":
            microseconds = _integer(key, parameter)
            if microseconds < 0:
                raise InvalidRequest(f"parameter 'timeout': expected microseconds, at least 0, got {microseconds}")
            timeout = microseconds * 1e-6 if microseconds else math.inf
        elif key == "binary_data_output":
            typed = not _boolean(key, parameter)
        elif key.startswith(REFUSED) and not _idle(parameter):
            raise InvalidRequest(f"parameter '{printable(key)}' is not supported here")
    return RequestParameters(priority, timeout, typed)


def parse_shared_memory(parameters: Parameters, what: str) -> RegionRange | None:
    """Where the elements of an input lie; None: in the message. `what` names the input in errors."""
    for key, parameter in parameters.items():
        if key.startswith(REFUSED) and not key.startswith(SHARED) and not _idle(parameter):
            raise InvalidRequest(f"{what}: parameter '{printable(key)}' is not supported here")
    return _place(parameters, what)


class OutputParameters(NamedTuple):
    """The parsed parameters of one requested output."""

    classes: int
    place: RegionRange | None
    typed: bool | None  # None: as for the whole request


def parse_output_parameters(parameters: Parameters, tensor: TensorSpec) -> OutputParameters:
    """Parse and check the parameters of a requested output."""
    what = f"output '{tensor.name}'"
    classes, typed = 0, None
    for key, parameter in parameters.items():
        if key == "classification":
            classes = _integer(key, parameter, what)
            if classes < 0:
                raise InvalidRequest(f"{what}: parameter 'classification': expected at least 1, got {classes}")
        elif key == "binary_data":
            typed = not _boolean(key, parameter, what)
        elif key.startswith(REFUSED) and not key.startswith(SHARED) and not _idle(parameter):
            raise InvalidRequest(f"{what}: parameter '{printable(key)}' is not supported here")
    place = _place(parameters, what)
    if classes and place is not None:
        raise InvalidRequest(f"{what}: expected classification or shared memory, got both")
    if classes and tensor.datatype.name in ("BYTES", "BOOL"):
        raise InvalidRequest(f"{what}: classification needs numbers, and it is of {tensor.datatype.name}")
    return OutputParameters(classes, place, typed)


def all_typed(wanted: list[OutputParameters], tensors: list[TensorSpec], default: bool) -> bool:
    """Whether the response has typed contents. A response has either those or raw bytes, so its outputs must agree.

    An output in shared memory has neither, so it does not count.
    """
    sent = [(a, t) for a, t in zip(wanted, tensors, strict=True) if a.place is None]
    said = {default if a.typed is None else a.typed for a, _ in sent}
    if len(said) > 1:
        raise InvalidRequest("parameter 'binary_data': expected the same for every output of one response, got both")
    typed = said == {True}
    for asked_for, tensor in sent:
        if typed and not asked_for.classes and tensor.datatype.contents is None:
            raise InvalidRequest(f"output '{tensor.name}': {tensor.datatype.name} travels in raw_output_contents only")
    return typed


def _place(parameters: Parameters, what: str) -> RegionRange | None:
    region: str | None = None
    sizes: dict[str, int] = {}
    for key, parameter in parameters.items():
        if not key.startswith(SHARED):
            continue
        if key == "shared_memory_region":
            if parameter.WhichOneof("parameter_choice") != "string_param":
                raise InvalidRequest(f"{what}: parameter '{key}': expected a string, got {_kind(parameter)}")
            region = parameter.string_param
        elif key in ("shared_memory_offset", "shared_memory_byte_size"):
            sizes[key] = _integer(key, parameter, what)
            if sizes[key] < 0:
                raise InvalidRequest(f"{what}: parameter '{key}': expected bytes, at least 0, got {sizes[key]}")
        else:
            raise InvalidRequest(f"{what}: parameter '{printable(key)}' is not supported here")
    if region is None and not sizes:
        return None
    nbytes = sizes.get("shared_memory_byte_size")
    if region is None or nbytes is None:
        missing = "shared_memory_region" if region is None else "shared_memory_byte_size"
        raise InvalidRequest(f"{what}: expected shared_memory_region and shared_memory_byte_size, {missing} is missing")
    return RegionRange(region, sizes.get("shared_memory_offset", 0), nbytes)


def _integer(key: str, parameter: Parameter, what: str = "") -> int:
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in INTEGERS:
        raise InvalidRequest(f"{what and what + ': '}parameter '{key}': expected an integer, got {_kind(parameter)}")
    value: int = getattr(parameter, kind)
    return value


def _boolean(key: str, parameter: Parameter, what: str = "") -> bool:
    if parameter.WhichOneof("parameter_choice") != "bool_param":
        raise InvalidRequest(f"{what and what + ': '}parameter '{key}': expected a bool, got {_kind(parameter)}")
    return bool(parameter.bool_param)


def _kind(parameter: Parameter) -> str:
    return parameter.WhichOneof("parameter_choice") or "nothing"


def _idle(parameter: Parameter) -> bool:
    """Whether a parameter is unset or zero: clients send `sequence_id` 0 and the like out of habit."""
    kind = parameter.WhichOneof("parameter_choice")
    return kind is None or not getattr(parameter, kind)
