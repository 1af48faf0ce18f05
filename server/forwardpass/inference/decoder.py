"""Decodes the bytes of a ModelInferRequest to a validated request. Pure.

From call to call a client's messages are the same except for their tensors and their id. The result of parsing and
validation is remembered by the other bytes, as a RequestTemplate; unknown messages are parsed in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from google.protobuf.message import DecodeError

from forwardpass import protocol
from forwardpass.errors import InvalidRequest, RequestError, TooLarge, printable
from forwardpass.execution.stacking import Buffer
from forwardpass.inference import tensor_contents
from forwardpass.inference.parameters import (
    NO_PARAMETERS,
    OutputOptions,
    RegionRange,
    RegionView,
    ResponseOptions,
    all_typed,
    parse_output_parameters,
    parse_request_parameters,
    parse_shared_memory,
)
from forwardpass.inference.request_template import NAME_LIMIT, Replies, RequestTemplate, ServingModel, TemplateMemory
from forwardpass.model.signature import ModelSignature, TensorSpec
from forwardpass.protocol.field_count import check_field_count
from forwardpass.protocol.request_messages import InferRequest, Parameters
from forwardpass.protocol.wire import ID_TAG, varint

KNOWN_REPLIES = 1024  # caches of replies, one for each model, outputs and number of rows


class ModelLookup(Protocol):
    """Where the decoder finds the models.

    `resolve(name, version)` returns the serving model version, or raises UnknownModel, ModelLoading, ModelUnusable.
    `generation` changes whenever the result of `resolve` may change.
    """

    generation: int

    def resolve(self, name: str, version: str) -> ServingModel: ...


class SharedMemory(Protocol):
    """Where the decoder finds shared memory. `window` raises UnknownRegion, or InvalidRequest beyond a region's end."""

    @property
    def most(self) -> int: ...  # most bytes of one input

    def window(self, place: RegionRange) -> RegionView: ...


class ParsedMessage(NamedTuple):
    """A message decoded without its template, and what is needed to remember that."""

    template: RequestTemplate
    buffers: Sequence[Buffer]  # in the order of the model's inputs
    id_field: bytes
    order: Sequence[int] | None  # the index of each model input in the message's; None: it must not be remembered
    raw: bool  # it has raw contents
    generation: int  # of the models that it was decoded by


class Decoder:
    """Decodes messages for one thread: every transport has its own. Only `parse` may be called by others."""

    def __init__(self, models: ModelLookup, max_message_bytes: int, regions: SharedMemory | None = None) -> None:
        """`regions` None: shared memory is turned off."""
        self._models = models
        self._max = max_message_bytes
        self._regions = regions
        self._memory = TemplateMemory()
        self._replies: dict[
            tuple[ServingModel, int, tuple[int, ...]], Replies
        ] = {}  # by all that RequestTemplate.replies depends on
        self._current = models.generation

    def refresh(self) -> None:
        """Forget the templates if a model was swapped. Call once before each group of messages."""
        if self._models.generation != self._current:
            self._current = self._models.generation
            self._memory.clear()
            self._replies.clear()

    def decode(self, message: bytes) -> tuple[RequestTemplate, Sequence[Buffer], bytes]:
        """The template of `message`, its tensors' bytes in the order of the model's inputs, and its id.

        The id is a field, tag and length included, which is the same in a ModelInferResponse; empty: none.
        Raises InvalidRequest or TooLarge naming what was expected and what came, or whatever `resolve` raises.
        """
        found = self.find(message)
        if found is None:
            parsed = self.parse(message)
            self._remember(message, parsed)
            found = parsed.template, parsed.buffers, parsed.id_field
        return found

    def find(self, message: bytes) -> tuple[RequestTemplate, Sequence[Buffer], bytes] | None:
        """As `decode`, for a message whose template is known; None for any other, which takes longer."""
        if len(message) > self._max:
            raise TooLarge(f"the message has {len(message)} bytes, the limit is {self._max}")
        return self._memory.find(message)

    def remember(self, message: bytes, parsed: ParsedMessage) -> None:
        """Keep the template of a message that another thread parsed."""
        if self._memory.find(message) is None:  # which notes where its id ends
            self._remember(message, parsed)

    def _remember(self, message: bytes, parsed: ParsedMessage) -> None:
        if parsed.order is not None and parsed.generation == self._current:
            self._memory.remember(message, parsed.template, parsed.order, parsed.buffers, parsed.raw)

    def parse(self, message: bytes) -> ParsedMessage:
        """Decode any message, by all of its bytes. The only method that other threads may call. Raises as `decode`."""
        generation = self._models.generation
        check_field_count(message, protocol.ModelInferRequest)
        try:
            request: InferRequest = protocol.ModelInferRequest.FromString(message)
        except (DecodeError, RuntimeError):
            raise InvalidRequest("the message is not a ModelInferRequest") from None
        _names(request)
        try:
            target = self._models.resolve(request.model_name, request.model_version)
        except RequestError as error:
            error.model = (request.model_name, request.model_version)
            raise
        signature = target.signature
        said = (
            parse_request_parameters(request.parameters, target.options.priority_levels)
            if request.parameters
            else NO_PARAMETERS
        )
        buffers, shapes, windows, order = self._inputs(request, signature)
        rows = _rows(shapes, signature)
        most = target.options.max_request_rows
        if rows > most:
            raise InvalidRequest(f"{rows} rows in one request; model '{target.name}' takes at most {most}")
        outputs = _outputs(request, signature)
        response_options = self._response_options(request, signature, outputs, said.typed)
        shared = 0
        # Copied last, after every other check of the request.
        for place, window in windows.items():
            buffers[place] = window.read()
            tensor_contents.check(buffers[place], signature.inputs[place], shapes[place])
            shared += len(buffers[place])
        replies = self._replies_of(target, rows, outputs)
        template = RequestTemplate(
            target,
            rows,
            shapes,
            outputs,
            priority=said.priority,
            timeout=said.timeout,
            response_options=response_options,
            shared=shared,
            replies=replies,
        )
        # A region may be unregistered, so it is looked up anew for every request.
        own = not windows and (response_options is None or not any(w.window for w in response_options.outputs))
        raw = bool(request.raw_input_contents)
        return ParsedMessage(template, buffers, _id_field(request.id), order if own else None, raw, generation)

    def _replies_of(self, target: ServingModel, rows: int, outputs: tuple[int, ...]) -> Replies:
        key = (target, rows, outputs)
        found = self._replies.get(key)
        if found is None:
            if len(self._replies) >= KNOWN_REPLIES:
                self._replies.clear()
            found = self._replies[key] = {}
        return found

    def _inputs(
        self, request: InferRequest, signature: ModelSignature
    ) -> tuple[list[Buffer], tuple[tuple[int, ...], ...], dict[int, RegionView], list[int]]:
        """Raw bytes and shape of every input, in the model's order; the windows still to be read, by place; and each
        one's index in the request's inputs."""
        given = request.inputs[:]  # slices of protobuf's containers are lists, made in one call
        raws = request.raw_input_contents[:]
        places: dict[int, int] = {}
        sources: dict[int, RegionRange] = {}
        for i, tensor in enumerate(given):
            name = tensor.name
            place = signature.input_place.get(name)
            if place is None:
                if name in signature.defaulted:
                    raise InvalidRequest(
                        f"input '{printable(name)}' cannot be sent: it is optional, and its default in the network "
                        "counts for every request; leave it out"
                    )
                expected = ", ".join(t.name for t in signature.inputs)
                raise InvalidRequest(f"unexpected input '{printable(name)}'; expected {expected}")
            if place in places:
                raise InvalidRequest(f"input '{printable(name)}' is given twice")
            places[place] = i
            if tensor.parameters and (where := parse_shared_memory(tensor.parameters, f"input '{name}'")) is not None:
                sources[i] = where
        sent = len(given) - len(sources)
        if raws and len(raws) != sent:
            raise InvalidRequest(f"{len(raws)} raw_input_contents for {sent} inputs; expected one for each")
        buffers: list[Buffer] = []
        shapes: list[tuple[int, ...]] = []
        windows: dict[int, RegionView] = {}
        order: list[int] = []
        for place, expected_tensor in enumerate(signature.inputs):
            if place not in places:
                raise InvalidRequest(f"missing input '{expected_tensor.name}'")
            i = places[place]
            tensor, where = given[i], sources.get(i) if sources else None
            shape = tensor_contents.shape_of(tensor, expected_tensor)
            if (raws or where is not None) and tensor.HasField("contents"):
                elsewhere = "raw_input_contents" if where is None else "shared memory"
                raise InvalidRequest(f"input '{tensor.name}': expected contents or {elsewhere}, got both")
            if where is not None:
                windows[place] = self._window(where, expected_tensor, shape)
                buffers.append(b"")
            elif raws:
                buffer = raws[i - sum([j < i for j in sources])] if sources else raws[i]
                tensor_contents.check(buffer, expected_tensor, shape)
                buffers.append(buffer)
            else:
                buffers.append(tensor_contents.typed(tensor, expected_tensor, shape))
            shapes.append(shape)
            order.append(i)
        return buffers, tuple(shapes), windows, order

    def _window(self, place: RegionRange, tensor: TensorSpec, shape: tuple[int, ...]) -> RegionView:
        """The window that an input is read from, checked before it is read."""
        regions = self._shared_memory()
        window = regions.window(place)
        if tensor.datatype.numpy is not None:
            tensor_contents.check_size(place.nbytes, tensor, shape)
        if place.nbytes > regions.most:
            raise TooLarge(f"input '{tensor.name}': {place.nbytes} bytes, the limit is {regions.most}")
        return window

    def _response_options(
        self, request: InferRequest, signature: ModelSignature, outputs: tuple[int, ...], typed: bool
    ) -> ResponseOptions | None:
        """How to send the response; None: plainly."""
        if not typed and not (request.outputs and any(o.parameters for o in request.outputs)):
            return None
        tensors = [signature.outputs[place] for place in outputs]
        named: list[Parameters] = [o.parameters for o in request.outputs] or [{}] * len(outputs)
        wanted = [
            parse_output_parameters(parameters, tensor) for parameters, tensor in zip(named, tensors, strict=True)
        ]
        typed = all_typed(wanted, tensors, typed)
        found = tuple(
            OutputOptions(w.classes, None if w.place is None else self._shared_memory().window(w.place)) for w in wanted
        )
        return ResponseOptions(found, typed) if typed or any(w != OutputOptions() for w in found) else None

    def _shared_memory(self) -> SharedMemory:
        if self._regions is None:
            raise InvalidRequest("shared memory is turned off on this server")
        return self._regions


def _id_field(request_id: str) -> bytes:
    if not request_id:
        return b""
    text = request_id.encode()
    return bytes((ID_TAG,)) + varint(len(text)) + text


def _names(request: InferRequest) -> None:
    names = request.model_name, request.model_version, request.id
    if max(map(len, names)) > NAME_LIMIT:
        for what, value in zip(("model name", "model version", "id"), names, strict=True):
            if len(value) > NAME_LIMIT:
                raise InvalidRequest(f"the {what} has {len(value)} characters, the limit is {NAME_LIMIT}")


def _rows(shapes: tuple[tuple[int, ...], ...], signature: ModelSignature) -> int:
    if not signature.batchable:
        return 1
    counts = [s[0] for s in shapes]
    if len(set(counts)) > 1:
        named = ", ".join(f"'{t.name}' {c}" for t, c in zip(signature.inputs, counts, strict=True))
        raise InvalidRequest(f"inputs differ in their number of rows: {named}")
    return counts[0]


def _outputs(request: InferRequest, signature: ModelSignature) -> tuple[int, ...]:
    if not request.outputs:
        return signature.default_outputs
    places: list[int] = []
    for output in request.outputs:
        place = signature.output_place.get(output.name)
        if place is None:
            known = ", ".join(t.name for t in signature.outputs)
            raise InvalidRequest(f"unknown output '{printable(output.name)}'; the outputs are {known}")
        if place in places:
            raise InvalidRequest(f"output '{printable(output.name)}' is requested twice")
        places.append(place)
    return tuple(places)
