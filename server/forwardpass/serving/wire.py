"""Bytes of a ModelInferRequest to a validated request; a network's rows to the bytes of a ModelInferResponse. Pure.

From call to call a client's message is the same but for the tensor bytes, which serialisers put last (field 7). So the
bytes before them key a small cache of what parsing and validating them gave, a `Header`. A message is known only if
it has a known length and begins with all of a header's bytes, the length of its tensor included; everything else
is parsed in full. The same goes for answers: all but the tensor bytes is made once per header.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from google.protobuf.message import DecodeError

from forwardpass.errors import InvalidRequest, TooLarge
from forwardpass.errors import printable as printable
from forwardpass.serving import contents, protocol
from forwardpass.serving.interface import Interface, Tensor
from forwardpass.serving.matrix import Buffer
from forwardpass.serving.wishes import (
    SAID_NOTHING,
    OutputWish,
    Place,
    Window,
    Wishes,
    all_typed,
    asked,
    general,
    source,
)

RAW_IN = b"\x3a"  # tag of ModelInferRequest.raw_input_contents (field 7, length-delimited)
RAW_OUT = b"\x32"  # tag of ModelInferResponse.raw_output_contents (field 6, length-delimited)
KNOWN_HEADERS = 1024  # headers remembered, all lengths together
KNOWN_PER_LENGTH = 8  # and of one length, since these are compared one by one
KNOWN_PREFIX = 4096  # bytes of the longest one remembered: a client must not fill the memory with parameters
NAME_LIMIT = 1024  # characters of a model's name or version, or of a request's id
COPY_BELOW = 4096  # bytes: below this a copy of a tensor is cheaper than a view of the message


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
        "batch_shapes", "id", "outputs", "prefix", "priority", "replies", "rows", "shared", "signature", "start",
        "target", "timeout", "wishes",
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
        wishes: Wishes | None = None,
        shared: int = 0,
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
        self.wishes = wishes  # how its answer is to be sent; None: the plain way
        self.shared = shared  # bytes of its inputs that came from shared memory, not in its message
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


class Regions(Protocol):
    """Where decoding finds shared memory. `window` raises UnknownRegion, or InvalidRequest beyond a region's end."""

    @property
    def most(self) -> int: ...  # bytes that one input may have

    def window(self, place: Place) -> Window: ...


class Decoder:
    """Decodes for one door. Not thread-safe: every door has its own."""

    def __init__(self, models: Models, max_message_bytes: int, regions: Regions | None = None) -> None:
        """`regions` None: shared memory is turned off."""
        self._models = models
        self._max = max_message_bytes
        self._regions = regions
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
        if len(buffers) == 1 and not request.id and request.raw_input_contents and not _uses_regions(header):
            self._remember(header, message, len(buffers[0]))
        return header, buffers

    def read(self, request: Any) -> tuple[Header, Sequence[Buffer]]:
        """As `decode`, from a parsed message."""
        _names(request)
        target = self._models.resolve(request.model_name, request.model_version)
        interface = target.interface
        said = general(request.parameters, target.priority_levels) if request.parameters else SAID_NOTHING
        buffers, shapes, windows = self._inputs(request, interface)
        rows = _rows(shapes, interface)
        if rows > target.max_request_rows:
            raise InvalidRequest(
                f"{rows} rows in one request; model '{target.name}' takes at most {target.max_request_rows}"
            )
        outputs = _outputs(request, interface)
        wishes = self._wishes(request, interface, outputs, said.typed)
        shared = 0
        # Last, once nothing else can be wrong with the request: these are copies.
        for place, window in windows.items():
            buffers[place] = window.read()
            contents.check(buffers[place], interface.inputs[place], shapes[place])
            shared += len(buffers[place])
        return Header(target, rows, shapes, outputs, request.id, said.priority, said.timeout, wishes, shared), buffers

    def _inputs(
        self, request: Any, interface: Interface
    ) -> tuple[list[Buffer], tuple[tuple[int, ...], ...], dict[int, Window]]:
        """Raw bytes and shape of every input, in the model's order; and by place those still to be read."""
        given = request.inputs
        raws = request.raw_input_contents
        places: dict[int, int] = {}
        sources: dict[int, Place] = {}
        for i, tensor in enumerate(given):
            place = interface.input_place.get(tensor.name)
            if place is None:
                expected = ", ".join(t.name for t in interface.inputs)
                raise InvalidRequest(f"unexpected input '{printable(tensor.name)}'; expected {expected}")
            if place in places:
                raise InvalidRequest(f"input '{printable(tensor.name)}' is given twice")
            places[place] = i
            if tensor.parameters and (where := source(tensor.parameters, f"input '{tensor.name}'")) is not None:
                sources[i] = where
        sent = len(given) - len(sources)
        if raws and len(raws) != sent:
            raise InvalidRequest(f"{len(raws)} raw_input_contents for {sent} inputs; expected one for each")
        buffers: list[Buffer] = []
        shapes: list[tuple[int, ...]] = []
        windows: dict[int, Window] = {}
        for place, expected_tensor in enumerate(interface.inputs):
            if place not in places:
                raise InvalidRequest(f"missing input '{expected_tensor.name}'")
            i = places[place]
            tensor, where = given[i], sources.get(i)
            shape = contents.shape_of(tensor, expected_tensor)
            if (raws or where is not None) and tensor.HasField("contents"):
                elsewhere = "raw_input_contents" if where is None else "shared memory"
                raise InvalidRequest(f"input '{tensor.name}': expected contents or {elsewhere}, got both")
            if where is not None:
                windows[place] = self._window(where, expected_tensor, shape)
                buffers.append(b"")
            elif raws:
                buffer = raws[i - sum(j < i for j in sources)]
                contents.check(buffer, expected_tensor, shape)
                buffers.append(buffer)
            else:
                buffers.append(contents.typed(tensor, expected_tensor, shape))
            shapes.append(shape)
        return buffers, tuple(shapes), windows

    def _window(self, place: Place, tensor: Tensor, shape: tuple[int, ...]) -> Window:
        """Where an input is to be read, checked before anything of it is."""
        regions = self._shared_memory()
        window = regions.window(place)
        if tensor.datatype.numpy is not None:
            contents.check_size(place.nbytes, tensor, shape)
        if place.nbytes > regions.most:
            raise TooLarge(f"input '{tensor.name}': {place.nbytes} bytes, the limit is {regions.most}")
        return window

    def _wishes(self, request: Any, interface: Interface, outputs: tuple[int, ...], typed: bool) -> Wishes | None:
        """How the answer is to be sent; None: the plain way."""
        if not typed and not (request.outputs and any(o.parameters for o in request.outputs)):
            return None
        tensors = [interface.outputs[place] for place in outputs]
        named: Sequence[Any] = [o.parameters for o in request.outputs] or [{}] * len(outputs)
        wanted = [asked(parameters, tensor) for parameters, tensor in zip(named, tensors, strict=True)]
        typed = all_typed(wanted, tensors, typed)
        found = tuple(
            OutputWish(w.classes, None if w.place is None else self._shared_memory().window(w.place)) for w in wanted
        )
        return Wishes(found, typed) if typed or any(w != OutputWish() for w in found) else None

    def _shared_memory(self) -> Regions:
        if self._regions is None:
            raise InvalidRequest("shared memory is turned off on this server")
        return self._regions

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


def _uses_regions(header: Header) -> bool:
    """Whether anything of the request is in shared memory: a region may be unregistered, so that is looked up anew."""
    return bool(header.shared) or (header.wishes is not None and any(w.window for w in header.wishes.outputs))


def varint(value: int) -> bytes:
    """`value` as protobuf writes lengths: seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _names(request: Any) -> None:
    for what, value in (
        ("model name", request.model_name),
        ("model version", request.model_version),
        ("id", request.id),
    ):
        if len(value) > NAME_LIMIT:
            raise InvalidRequest(f"the {what} has {len(value)} characters, the limit is {NAME_LIMIT}")


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
