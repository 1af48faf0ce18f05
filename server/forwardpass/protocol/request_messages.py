"""Static types of a ModelInferRequest's messages for the decoder: protobuf creates its classes untyped at run time.

Containers are protobuf's: a slice of one is a list, made in one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class Message(Protocol):
    """The methods of every message."""

    def HasField(self, name: str) -> bool: ...  # noqa: N802
    def ListFields(self) -> Sequence[tuple[FieldDescriptor, object]]: ...  # noqa: N802
    def SerializeToString(self) -> bytes: ...  # noqa: N802


class FieldDescriptor(Protocol):
    name: str


class Parameter(Protocol):
    """InferParameter: at most one of its fields is set."""

    bool_param: bool
    int64_param: int
    uint64_param: int
    string_param: str
    double_param: float

    def WhichOneof(self, name: str) -> str | None: ...  # noqa: N802


Parameters = Mapping[str, Parameter]


class InputTensor(Message, Protocol):
    """InferInputTensor."""

    name: str
    datatype: str
    shape: Sequence[int]
    parameters: Parameters
    contents: Message  # InferTensorContents


class RequestedOutput(Protocol):
    """InferRequestedOutputTensor."""

    name: str
    parameters: Parameters


class InferRequest(Protocol):
    """ModelInferRequest."""

    model_name: str
    model_version: str
    id: str
    parameters: Parameters
    inputs: Sequence[InputTensor]
    outputs: Sequence[RequestedOutput]
    raw_input_contents: Sequence[bytes]
