"""A server's responses as Python values, and their parsing: models, versions, answers, timings. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from forwardpass import protocol
from forwardpass.client import notebook
from forwardpass.client.arrays import TensorInfo, from_raw, from_typed
from forwardpass.client.errors import Internal, InvalidArgument
from forwardpass.client.ranking import Ranked, ranked
from forwardpass.protocol.timings import Timings
from forwardpass.protocol.wire import RAW_OUT, varint

Parameter = bool | int | float | str


@dataclass(frozen=True, repr=False)
class ModelInfo:
    """A model's inputs and outputs, and the versions served now."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    parameters: Mapping[str, Parameter]  # the server's additional facts, if it sends any

    @cached_property
    def input_named(self) -> dict[str, TensorInfo]:
        return {tensor.name: tensor for tensor in self.inputs}

    def only_input(self) -> TensorInfo:
        """The input of a model that has one. Raises InvalidArgument naming the inputs if there are several."""
        if len(self.inputs) != 1:
            raise InvalidArgument(f"model '{self.name}' has the inputs {names(self.inputs)}: give a mapping of arrays")
        return self.inputs[0]

    def labels(self, output: str) -> tuple[str, ...]:
        """Labels of the indices of an output's last axis, in order; empty if the model has none."""
        return next((tensor.labels for tensor in self.outputs if tensor.name == output), ())

    @property
    def batching(self) -> str:
        """Whether requests share a run, in words; "" for a server that does not report it."""
        rows = self.parameters.get("max_batch_size")
        return "" if rows is None else f"up to {rows} rows" if rows else "one request at a time"

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.inputs))} -> {', '.join(map(str, self.outputs))}"

    def __repr__(self) -> str:
        return f"<Model {self.name!r}, versions {', '.join(self.versions) or 'unknown'}: {self}>"

    def _repr_html_(self) -> str:
        tensors = [("input", tensor) for tensor in self.inputs] + [("output", tensor) for tensor in self.outputs]
        rows = [(kind, t.name, t.datatype, t.sizes, ", ".join(t.labels or t.categories)) for kind, t in tensors]
        caption = f"{self.name}, versions {', '.join(self.versions) or 'unknown'}"
        below = f"batching: {self.batching}" if self.batching else ""
        return notebook.table(caption, ("", "name", "datatype", "shape", "columns, classes or categories"), rows, below)


@dataclass(frozen=True, slots=True)
class ModelState:
    """One version of a model in the server's repository. `version` is empty if none is loaded."""

    name: str
    version: str
    state: str  # READY, LOADING, UNLOADING, UNAVAILABLE
    reason: str  # the reason why it is not ready


class ModelList(list[ModelState]):
    """A list, which a notebook shows as a table."""

    def _repr_html_(self) -> str:
        rows = [(model.name, model.version, model.state, model.reason) for model in self]
        return notebook.table(f"{len(rows)} model versions", ("name", "version", "state", "reason"), rows)


@dataclass(frozen=True, slots=True)
class ServerInfo:
    name: str
    version: str
    extensions: tuple[str, ...]


class Answer(Mapping[str, NDArray[Any]]):
    """The outputs of one request by name, in the order received; each array is owned by the caller."""

    __slots__ = ("_arrays", "_info", "id", "model", "timings", "version")

    def __init__(
        self,
        arrays: dict[str, NDArray[Any]],
        info: ModelInfo,
        model: str,
        version: str,
        id: str,
        timings: Timings | None,
    ) -> None:
        self._arrays = arrays
        self._info = info
        self.model = model
        self.version = version  # the version that answered
        self.id = id
        self.timings = timings  # None if they were not requested

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def only(self) -> NDArray[Any]:
        """The array of an answer with one output. Raises InvalidArgument naming the outputs if there are several."""
        if len(self._arrays) != 1:
            raise InvalidArgument(f"model '{self.model}' gives {', '.join(self._arrays)}: ask for one of them")
        return next(iter(self._arrays.values()))

    def labels(self, name: str) -> tuple[str, ...]:
        """Labels of the indices of an output's last axis, in order; empty if the model has none."""
        return self._info.labels(name)

    def top(self, k: int = 1, *, output: str | None = None, softmax: bool | None = None) -> list[list[Ranked]]:
        """The `k` largest values of each row, the largest first, with their labels and probabilities.

        `output` None: the only one, or the only one with labels. `softmax` None: taken of outputs whose name has
        `logit`; values of others are probabilities where rows sum to 1, and are left as they are. A row with NaN has
        none. Raises InvalidArgument for an output that is no rows of numbers.
        """
        name = self._ranked_output() if output is None else output
        if name not in self._arrays:
            raise InvalidArgument(
                f"model '{self.model}' gave {', '.join(self._arrays)}; expected one of them, got {name}"
            )
        return ranked(self._arrays[name], name, self.labels(name), k, softmax)

    def _ranked_output(self) -> str:
        found = [name for name in self._arrays if len(self._arrays) == 1 or self.labels(name)]
        if len(found) != 1:
            raise InvalidArgument(f"model '{self.model}' gave {', '.join(self._arrays)}: name the output to rank")
        return found[0]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {array.dtype}{list(array.shape)}" for name, array in self._arrays.items())
        return f"<Answer of {self.model!r} version {self.version!r}: {shapes}>"

    def _repr_html_(self) -> str:
        labels = {name: self.labels(name) for name in self._arrays}
        shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in self._arrays.items())
        return notebook.answer_table(f"{self.model} version {self.version}", self._arrays, labels, shapes)


class Template(NamedTuple):
    """A response with one output and no id, without its tensor bytes: the same from call to call, and slow to parse."""

    length: int  # of the whole message
    prefix: bytes  # the message before the tensor bytes, which end it
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    model: str
    version: str

    def tensor_of(self, message: bytes) -> NDArray[Any] | None:
        """The tensor of a response that matches the template; None if it does not match."""
        if len(message) != self.length or not message.startswith(self.prefix):
            return None
        return np.frombuffer(message, self.dtype, offset=len(self.prefix)).reshape(self.shape).copy()


def read_answer(
    message: bytes, info: ModelInfo, timings: Timings | None, known: Template | None
) -> tuple[Answer, Template | None]:
    """The answer in a serialized ModelInferResponse, and the template to match the next one with.

    Raises Internal if it is no such message, or if its bytes do not match its shapes.
    """
    if known is not None and (array := known.tensor_of(message)) is not None:
        return Answer({known.name: array}, info, known.model, known.version, "", timings), known
    response = parse(protocol.ModelInferResponse, message)
    answer = answer_of(response, info, timings, response.id)
    return answer, _template(message, answer, response.raw_output_contents)


def answer_of(response: Any, info: ModelInfo, timings: Timings | None, id: str) -> Answer:
    """The answer in a ModelInferResponse. Raises Internal if its bytes do not match its shapes."""
    raw = response.raw_output_contents
    if raw and len(raw) != len(response.outputs):
        raise Internal(f"the answer has {len(response.outputs)} outputs and {len(raw)} raw contents")
    arrays = {}
    for place, tensor in enumerate(response.outputs):
        name, datatype, shape = tensor.name, tensor.datatype, tuple(tensor.shape)
        if raw:
            arrays[name] = from_raw(raw[place], datatype, shape, name)
        else:
            arrays[name] = from_typed(tensor.contents, datatype, shape, name)
    return Answer(arrays, info, response.model_name, response.model_version, id, timings)


def _template(message: bytes, answer: Answer, raw: Sequence[bytes]) -> Template | None:
    """The template of `answer`, if its message ends with `tag, length, tensor` and has one numeric output; else None.

    The bytes before that tag must be a valid message: this ensures that it is a tag, and not part of another field that
    looks like one.
    """
    if len(answer) != 1 or len(raw) != 1 or not raw[0] or answer.id:
        return None
    ((name, array),) = answer.items()
    tag = RAW_OUT + varint(len(raw[0]))
    prefix = message[: -len(raw[0])]
    if array.dtype == object or not prefix.endswith(tag):
        return None
    try:
        protocol.ModelInferResponse.FromString(prefix[: -len(tag)])
    except DecodeError:
        return None
    return Template(len(message), prefix, name, array.dtype, array.shape, answer.model, answer.version)


def parse(cls: protocol.MessageClass, data: bytes) -> Any:
    """`data` as a message. Raises Internal."""
    try:
        return cls.FromString(data)
    except DecodeError:
        raise Internal(f"the answer is no {cls.DESCRIPTOR.name}") from None


def read_info(response: Any) -> ModelInfo:
    """The ModelInfo in a ModelMetadataResponse."""
    return ModelInfo(
        name=response.name,
        versions=tuple(response.versions),
        platform=response.platform,
        inputs=tuple(_tensor(tensor) for tensor in response.inputs),
        outputs=tuple(_tensor(tensor) for tensor in response.outputs),
        parameters={key: _value(parameter) for key, parameter in sorted(response.parameters.items())},
    )


def _tensor(metadata: Any) -> TensorInfo:
    return TensorInfo(
        name=metadata.name,
        datatype=metadata.datatype,
        shape=tuple(metadata.shape),
        labels=_words(metadata.parameters, "labels"),
        categories=_words(metadata.parameters, "categories"),
    )


def _words(parameters: Any, key: str) -> tuple[str, ...]:
    try:
        words = json.loads(parameters[key].string_param) if key in parameters else []
    except ValueError:
        return ()  # another server's different format
    return tuple(str(word) for word in words) if isinstance(words, list) else ()


def _value(parameter: Any) -> Parameter:
    kind = parameter.WhichOneof("parameter_choice")
    value: Parameter = getattr(parameter, kind) if kind else ""
    return value


def names(tensors: Iterable[TensorInfo]) -> str:
    return ", ".join(f"'{tensor.name}'" for tensor in tensors)
