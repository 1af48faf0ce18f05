"""Bytes of a ModelInferRequest to a validated request; a network's rows to the bytes of a ModelInferResponse. Pure.

From call to call a client's message is the same but for the tensor bytes, which serialisers put last (field 7). So the
bytes before them key a small cache of what parsing and validating them gave, a `Header`. A message is known only if
it has a known length and begins with all of a header's bytes, the length of its tensor included; everything else
is parsed in full. The same goes for answers: all but the tensor bytes is made once per header.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from google.protobuf.message import DecodeError

from forwardpass.errors import InvalidRequest, TooLarge
from forwardpass.serving import protocol
from forwardpass.serving.interface import Interface, Tensor
from forwardpass.serving.matrix import Buffer, elements, pack

RAW_IN = b"\x3a"  # tag of ModelInferRequest.raw_input_contents (field 7, length-delimited)
RAW_OUT = b"\x32"  # tag of ModelInferResponse.raw_output_contents (field 6, length-delimited)
KNOWN_HEADERS = 1024  # headers remembered, all lengths together
KNOWN_PER_LENGTH = 8  # and of one length, since these are compared one by one
KNOWN_PREFIX = 4096  # bytes of the longest one remembered: a client must not fill the memory with parameters
NAME_LIMIT = 1024  # characters of a model's name or version, or of a request's id
ELEMENT_LIMIT = 1 << 40  # product of a tensor's sizes other than 0: what is larger can't be sent anyhow
COPY_BELOW = 4096  # bytes: below this a copy of a tensor is cheaper than a view of the message
NO_PRIORITY = 0
# Parameters that mean something here. Others are allowed by the protocol and have no effect, except these families,
# whose silent neglect would change an answer.
REFUSED_PARAMETERS = ("sequence_", "shared_memory_", "classification")


class Target(Protocol):
    """What decoding needs to know of a model version that serves."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def interface(self) -> Interface: ...
    @property
    def max_request_rows(self) -> int: ...
    @property
    def priority_levels(self) -> int: ...


class Header:
    """What a request's message says beside its tensor bytes, validated; shared by all requests that say the same."""

    __slots__ = (
        "batch_shapes", "id", "outputs", "prefix", "priority", "replies", "rows", "signature", "start", "target",
        "timeout",
    )  # fmt: skip

    def __init__(
        self,
        target: Any,
        rows: int,
        shapes: tuple[tuple[int, ...], ...],
        outputs: tuple[int, ...],
        request_id: str,
        priority: int,
        timeout: float,
    ) -> None:
        self.target = target
        self.rows = rows  # rows it brings; 1 where the model is not batchable
        self.batch_shapes = shapes  # of each input, in the model's order
        batchable = target.interface.batchable
        # Equal signatures may share a matrix: the same sizes beyond the batch axis. What cannot be stacked is told
        # apart by the model's batch limit of one, not here.
        self.signature = tuple(s[1:] for s in shapes) if batchable else shapes
        self.outputs = outputs  # places of the outputs to send, in the order asked for
        self.id = request_id
        self.priority = priority
        self.timeout = timeout  # seconds from arrival; inf: none
        self.replies: dict[Any, tuple[bytes, ...]] = {}  # answer's shapes -> the bytes before each of its tensors
        self.prefix = b""  # the message up to its tensor bytes, where it may be remembered
        self.start = 0


class Models(Protocol):
    """Where decoding finds the models.

    `resolve(name, version)` gives the model version that serves, or raises UnknownModel, ModelLoading, ModelUnusable.
    `generation` changes whenever `resolve` might answer differently.
    """

    generation: int

    def resolve(self, name: str, version: str) -> Target: ...


class Decoder:
    """Decodes for one door. Not thread-safe: every door has its own."""

    def __init__(self, models: Models, max_message_bytes: int) -> None:
        self._models = models
        self._max = max_message_bytes
        self._known: dict[int, list[Header]] = {}
        self._count = 0
        self._current = models.generation

    def refresh(self) -> None:
        """Call once before a group of messages: forget what was remembered if a model was swapped since."""
        if self._models.generation != self._current:
            self._current = self._models.generation
            self._known.clear()
            self._count = 0

    def decode(self, message: bytes) -> tuple[Header, Sequence[Buffer]]:
        """The header of `message` and its tensors' bytes, in the order of the model's inputs.

        Raises InvalidRequest or TooLarge naming what was expected and what came, or whatever `resolve` raises.
        """
        for header in self._known.get(len(message), ()):
            if message.startswith(header.prefix):
                if len(message) - header.start < COPY_BELOW:
                    return header, (message[header.start :],)
                return header, (memoryview(message)[header.start :],)
        return self._parse(message)

    def _parse(self, message: bytes) -> tuple[Header, Sequence[Buffer]]:
        if len(message) > self._max:
            raise TooLarge(f"the message has {len(message)} bytes, the limit is {self._max}")
        request = protocol.ModelInferRequest()
        try:
            request.ParseFromString(message)
        except (DecodeError, RuntimeError):
            raise InvalidRequest("the message is not a ModelInferRequest") from None
        header, buffers = self.read(request)
        if len(buffers) == 1 and not request.id and request.raw_input_contents:
            self._remember(header, message, len(buffers[0]))
        return header, buffers

    def read(self, request: Any) -> tuple[Header, Sequence[Buffer]]:
        """As `decode`, from a parsed message."""
        _names(request)
        target = self._models.resolve(request.model_name, request.model_version)
        interface = target.interface
        priority, timeout = _parameters(request, target)
        buffers, shapes = _inputs(request, interface)
        rows = _rows(shapes, interface)
        if rows > target.max_request_rows:
            raise InvalidRequest(
                f"{rows} rows in one request; model '{target.name}' takes at most {target.max_request_rows}"
            )
        header = Header(target, rows, shapes, _outputs(request, interface), request.id, priority, timeout)
        return header, buffers

    def _remember(self, header: Header, message: bytes, size: int) -> None:
        """Only a message that ends with `tag, length, tensor` can be known again by the bytes before its tensor.

        What stands before that tag must be a message by itself: so the tag is one, and not the middle of some other
        field that reads like it. BYTES are never remembered, since their elements must be looked at.
        """
        tag = RAW_IN + varint(size)
        start = len(message) - size
        if not size or start > KNOWN_PREFIX or not message[:start].endswith(tag):
            return
        if not header.target.interface.inputs[0].datatype.itemsize:
            return
        try:
            protocol.ModelInferRequest.FromString(message[: start - len(tag)])
        except (DecodeError, RuntimeError):
            return
        if self._count >= KNOWN_HEADERS:
            self._known.clear()
            self._count = 0
        known = self._known.setdefault(len(message), [])
        if len(known) >= KNOWN_PER_LENGTH:
            self._count -= len(known)
            known.clear()
        header.prefix = message[:start]
        header.start = start
        known.append(header)
        self._count += 1


def varint(value: int) -> bytes:
    """`value` as protobuf writes lengths: seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def printable(text: str, limit: int = 80) -> str:
    """Somebody else's text, safe for one line of an error or a log."""
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:limit])
    return shown + ("…" if len(text) > limit else "")


def _names(request: Any) -> None:
    for what, value in (
        ("model name", request.model_name),
        ("model version", request.model_version),
        ("id", request.id),
    ):
        if len(value) > NAME_LIMIT:
            raise InvalidRequest(f"the {what} has {len(value)} characters, the limit is {NAME_LIMIT}")


def _parameters(request: Any, target: Target) -> tuple[int, float]:
    """Priority (0: the model's default) and timeout in seconds, from the schedule_policy parameters."""
    priority, timeout = NO_PRIORITY, math.inf
    for key, parameter in request.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if key in ("priority", "timeout"):
            if kind not in ("int64_param", "uint64_param"):
                raise InvalidRequest(f"parameter '{key}': expected an integer, got {kind or 'nothing'}")
            value = getattr(parameter, kind)
            if key == "priority":
                if not 0 <= value <= target.priority_levels:
                    raise InvalidRequest(
                        f"parameter 'priority': expected 1 to {target.priority_levels}, or 0 for the default, "
                        f"got {value}"
                    )
                priority = value
            elif value < 0:
                raise InvalidRequest(f"parameter 'timeout': expected microseconds, at least 0, got {value}")
            elif value:
                timeout = value * 1e-6
        elif key.startswith(REFUSED_PARAMETERS) and not _idle(parameter, kind):
            raise InvalidRequest(f"parameter '{printable(key)}' is not supported here")
    return priority, timeout


def _idle(parameter: Any, kind: str | None) -> bool:
    """Whether a parameter says nothing: clients send `sequence_id` 0 and the like out of habit."""
    return kind is None or not getattr(parameter, kind)


def _inputs(request: Any, interface: Interface) -> tuple[Sequence[Buffer], tuple[tuple[int, ...], ...]]:
    """Raw bytes and shape of every input, in the model's order."""
    given = request.inputs
    contents = request.raw_input_contents
    if contents and len(contents) != len(given):
        raise InvalidRequest(f"{len(contents)} raw_input_contents for {len(given)} inputs; expected one for each")
    places: dict[int, int] = {}
    for i, tensor in enumerate(given):
        place = interface.input_place.get(tensor.name)
        if place is None:
            expected = ", ".join(t.name for t in interface.inputs)
            raise InvalidRequest(f"unexpected input '{printable(tensor.name)}'; expected {expected}")
        if place in places:
            raise InvalidRequest(f"input '{printable(tensor.name)}' is given twice")
        places[place] = i
    buffers: list[Buffer] = []
    shapes: list[tuple[int, ...]] = []
    for place, expected_tensor in enumerate(interface.inputs):
        if place not in places:
            raise InvalidRequest(f"missing input '{expected_tensor.name}'")
        tensor = given[places[place]]
        shape = _shape(tensor, expected_tensor)
        if contents:
            if tensor.HasField("contents"):
                raise InvalidRequest(f"input '{tensor.name}': expected contents or raw_input_contents, got both")
            buffer = contents[places[place]]
            _check_raw(buffer, expected_tensor, shape)
        else:
            buffer = _typed(tensor, expected_tensor, shape)
        buffers.append(buffer)
        shapes.append(shape)
    return buffers, tuple(shapes)


def _shape(given: Any, expected: Tensor) -> tuple[int, ...]:
    name = expected.name
    if given.datatype != expected.datatype.name:
        raise InvalidRequest(
            f"input '{name}': expected datatype {expected.datatype.name}, got '{printable(given.datatype)}'"
        )
    for key, parameter in given.parameters.items():
        if key.startswith(REFUSED_PARAMETERS) and not _idle(parameter, parameter.WhichOneof("parameter_choice")):
            raise InvalidRequest(f"input '{name}': parameter '{printable(key)}' is not supported here")
    shape = tuple(given.shape)
    if len(shape) != len(expected.shape):
        raise InvalidRequest(
            f"input '{name}': expected {len(expected.shape)} dimensions {_show(expected.shape)}, got {_show(shape)}"
        )
    for got, want in zip(shape, expected.shape, strict=True):
        if got < 0:
            raise InvalidRequest(f"input '{name}': expected sizes of at least 0, got {_show(shape)}")
        if want >= 0 and got != want:
            raise InvalidRequest(f"input '{name}': expected shape {_show(expected.shape)}, got {_show(shape)}")
    if math.prod(s or 1 for s in shape) > ELEMENT_LIMIT:  # 0 x 2**62 is empty, and yet no array
        raise InvalidRequest(f"input '{name}': the sizes of {_show(shape)} are out of range")
    return shape


def _show(shape: Sequence[int]) -> str:
    return "[" + ",".join(str(s) for s in shape[:16]) + (",…" if len(shape) > 16 else "") + "]"


def _check_raw(buffer: bytes, tensor: Tensor, shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    if tensor.datatype.numpy is None:
        elements(buffer, tensor.name, count)
        return
    expected = count * tensor.datatype.itemsize
    if len(buffer) != expected:
        raise InvalidRequest(
            f"input '{tensor.name}': shape {_show(shape)} of {tensor.datatype.name} takes {expected} bytes, "
            f"got {len(buffer)}"
        )


def _typed(given: Any, tensor: Tensor, shape: tuple[int, ...]) -> bytes:
    """Typed contents as raw bytes. Values must be in the one field that belongs to the datatype, and in its range."""
    datatype = tensor.datatype
    count = math.prod(shape)
    filled = [field.name for field, _ in given.contents.ListFields()]
    if datatype.contents is None:
        if filled or count:
            raise InvalidRequest(f"input '{tensor.name}': {datatype.name} travels in raw_input_contents only")
        return b""
    wrong = [name for name in filled if name != datatype.contents]
    if wrong:
        raise InvalidRequest(
            f"input '{tensor.name}': {datatype.name} travels in {datatype.contents}, got {', '.join(wrong)}"
        )
    values = getattr(given.contents, datatype.contents)
    if len(values) != count:
        raise InvalidRequest(
            f"input '{tensor.name}': shape {_show(shape)} has {count} elements, got {len(values)} in "
            f"{datatype.contents}"
        )
    if datatype.numpy is None:
        packed = pack(values)
        elements(packed, tensor.name, count)
        return packed
    wide = np.fromiter(values, dtype=_carrier(datatype), count=count)
    narrow = wide.astype(datatype.numpy)
    if datatype.numpy.kind in "iu" and not np.array_equal(wide, narrow):
        worst = wide[np.argmax(wide != narrow)]
        raise InvalidRequest(f"input '{tensor.name}': {worst} is not in the range of {datatype.name}")
    return narrow.tobytes()


def _carrier(datatype: protocol.Datatype) -> Any:
    """The type in which protobuf hands out the values of a datatype's contents field."""
    return {"int_contents": np.int64, "uint_contents": np.uint64}.get(datatype.contents or "", datatype.numpy)


def _rows(shapes: tuple[tuple[int, ...], ...], interface: Interface) -> int:
    if not interface.batchable:
        return 1
    counts = [s[0] for s in shapes]
    if any(c != counts[0] for c in counts):
        named = ", ".join(f"'{t.name}' {c}" for t, c in zip(interface.inputs, counts, strict=True))
        raise InvalidRequest(f"inputs differ in their number of rows: {named}")
    return counts[0]


def _outputs(request: Any, interface: Interface) -> tuple[int, ...]:
    if not request.outputs:
        return interface.default_outputs
    places: list[int] = []
    for output in request.outputs:
        place = interface.output_place.get(output.name)
        if place is None:
            known = ", ".join(t.name for t in interface.outputs)
            raise InvalidRequest(f"unknown output '{printable(output.name)}'; the outputs are {known}")
        if place in places:
            raise InvalidRequest(f"output '{printable(output.name)}' is requested twice")
        for key, parameter in output.parameters.items():
            if key.startswith(REFUSED_PARAMETERS) and not _idle(parameter, parameter.WhichOneof("parameter_choice")):
                raise InvalidRequest(f"output '{output.name}': parameter '{printable(key)}' is not supported here")
        places.append(place)
    return tuple(places)


def reply_parts(header: Header, shapes: tuple[tuple[int, ...], ...], sizes: tuple[int, ...]) -> tuple[bytes, ...]:
    """What goes before the bytes of each output in a ModelInferResponse.

    `shapes` and `sizes` (bytes) are those of the tensors to send, in the header's order of outputs.
    """
    response = protocol.ModelInferResponse(model_name=header.target.name, model_version=header.target.version)
    response.id = header.id
    for place, shape in zip(header.outputs, shapes, strict=True):
        tensor = header.target.interface.outputs[place]
        response.outputs.add(name=tensor.name, datatype=tensor.datatype.name, shape=shape)
    parts = [RAW_OUT + varint(size) for size in sizes]
    parts[0] = response.SerializeToString() + parts[0]
    return tuple(parts)
