"""Remembers parsed requests without their tensors and ids, keyed by the bytes around these.

Clients send the same bytes again and again except for the tensors and the id. A template applies only to a message
whose other bytes equal those of a message that was parsed in full, so the parsed result holds for it too. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Protocol

from forwardpass.batching.request import WorkerOptions
from forwardpass.execution.stacking import Buffer
from forwardpass.inference.parameters import ResponseOptions
from forwardpass.model.signature import ModelSignature
from forwardpass.protocol.wire import ID_TAG, NAME_TAG, VERSION_TAG, Span, tensor_spans
from forwardpass.transport.memory_budget import COUNTED_FROM

if TYPE_CHECKING:
    from forwardpass.inference.request import AnyRequest

NAME_LIMIT = 1024  # characters of a model's name or version, or of a request's id
KNOWN_TEMPLATES = 2048  # of one generation; there are two
KNOWN_BYTES = 4 << 20  # of the messages of one generation, without tensors
KNOWN_LONGEST = 4096  # bytes of a message without its tensors: the memory is not meant for parameters
KNOWN_AT_ONCE = 64  # of one model; beyond these only one new message in RARELY, so that few are kept in vain
RARELY = 4
KNOWN_LAYOUTS = 8  # of one model and message length, since they are tried one by one
COPY_BELOW = 4096  # bytes; below this, copying a tensor is cheaper than a view of the message

EMPTY_BYTES = 4  # bytes of an empty BYTES element

# Datatypes whose typed contents may equal the raw bytes: for any value, or only for these values of one-byte varints.
AS_RAW = {"FP32": None, "FP64": None, "BOOL": b"\0\1", "UINT8": bytes(range(128)), "INT8": bytes(range(128))}


# The bytes around a response's id and tensors, by the response's shapes.
Replies = dict[Hashable, tuple[bytes, ...]]


class ServingModel(Protocol):
    """A serving model version, as its requests see it."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def signature(self) -> ModelSignature: ...
    @property
    def options(self) -> WorkerOptions: ...
    def cancel(self, request: AnyRequest) -> None:
        """Cancel one of its requests, whose client no longer waits."""


class RequestTemplate:
    """A validated request message without its tensors and its id; shared by all requests that match it."""

    __slots__ = (
        "answer_bytes",
        "batch_shapes",
        "outputs",
        "priority",
        "replies",
        "response_options",
        "rows",
        "shared",
        "stack_key",
        "target",
        "timeout",
    )  # fmt: skip

    def __init__(
        self,
        target: ServingModel,
        rows: int,
        shapes: tuple[tuple[int, ...], ...],
        outputs: tuple[int, ...],
        *,
        priority: int,
        timeout: float,
        response_options: ResponseOptions | None = None,
        shared: int = 0,
        replies: Replies | None = None,
    ) -> None:
        self.target = target
        self.rows = rows  # rows of the request; 1 if the model is not batchable
        self.batch_shapes = shapes  # of each input, in the model's order
        batchable = target.signature.batchable
        # Requests of equal stack keys may share a matrix: equal sizes beyond the batch axis. Models that cannot be
        # stacked have a batch limit of one instead.
        self.stack_key = tuple([s[1:] for s in shapes]) if batchable else shapes
        # Bytes of its answers, by the signature, or where that leaves sizes open those of its last answer; 0: few.
        self.answer_bytes = _expected_bytes(target.signature, rows, outputs)
        self.outputs = outputs  # places of the outputs to send, in the requested order
        self.priority = priority
        self.timeout = timeout  # seconds from arrival; inf: none
        self.response_options = response_options  # how to send its response; None: plainly
        self.shared = shared  # bytes of its inputs read from shared memory, not from its message
        # The bytes around a response's id and tensors, by its shapes. Shared by templates of the same target, rows and
        # outputs, which is all that they depend on.
        self.replies: Replies = {} if replies is None else replies


def _expected_bytes(signature: ModelSignature, rows: int, outputs: tuple[int, ...]) -> int:
    """The bytes of these outputs, with sizes that the signature leaves open taken for 1; 0 if they are few."""
    total = 0
    for place in outputs:
        tensor = signature.outputs[place]
        sizes = (rows, *tensor.shape[1:]) if signature.batchable else tensor.shape
        total += math.prod([size if size >= 0 else 1 for size in sizes]) * (tensor.datatype.itemsize or EMPTY_BYTES)
    return total if total >= COUNTED_FROM else 0


Found = tuple[RequestTemplate, Sequence[Buffer], bytes]


class Layout:
    """Where the tensors lie in messages of one length. Offsets are counted from the end of the id."""

    __slots__ = ("_checks", "_gaps", "_spans", "tail")

    def __init__(
        self, spans: Sequence[Span], length: int, order: Sequence[int], checks: Sequence[bytes | None] = ()
    ) -> None:
        """`order`: the index of each model input's span. `checks`: the byte values that each input may contain."""
        bounds = [0, *(place for span in spans for place in span), length]
        self._gaps = list(zip(bounds[::2], bounds[1::2], strict=True))  # all the other bytes
        self._spans = [spans[i] for i in order]
        self._checks = checks if any(checks) else ()
        # The offset from which the message is a single tensor; -1: it has another layout, or checks.
        self.tail = spans[0][0] if spans[-1] == (spans[0][0], length) and not self._checks else -1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and (self._spans, self._checks) == (other._spans, other._checks)

    __hash__ = None  # type: ignore[assignment]

    def key(self, message: bytes, start: int) -> bytes:
        return b"".join([message[start + a : start + b] for a, b in self._gaps])

    def tensors(self, message: bytes, start: int) -> Sequence[Buffer] | None:
        """The tensors in the order of the model's inputs; None: they contain bytes that are not allowed."""
        found = [cut(message, start + a, start + b) for a, b in self._spans]
        for tensor, allowed in zip(found, self._checks, strict=False):
            if allowed is not None and bytes(tensor).translate(None, allowed):
                return None
        return found


# By the bytes of name and version, then by the length of the rest without the id: the layouts of such messages, each
# with its templates, keyed by the bytes around the tensors.
Templates = dict[bytes, RequestTemplate]
Generation = dict[bytes, dict[int, list[tuple[Layout, Templates]]]]


class TemplateMemory:
    """Templates of recent messages. Not thread-safe.

    When the young generation is full it replaces the old one; templates found in the old one move to the young. So
    frequent messages stay, however many others arrive once.
    """

    def __init__(self) -> None:
        self._young: Generation = {}
        self._old: Generation = {}
        self._count = 0  # templates in the young generation
        self._missed = (0, 0)  # the ends of name and version, and of the id, in the last message not found
        self._bytes = 0
        self._new: dict[bytes, int] = {}  # messages new to the young generation, by name and version

    def clear(self) -> None:
        self._young = {}
        self._turn()

    def find(self, message: bytes) -> Found | None:
        """A message's template, its tensors in the order of the model's inputs, and its id field; None if unknown."""
        size = len(message)
        names_end = start = 0
        try:
            if message[0] == NAME_TAG and message[1] < 0x80:
                names_end = message[1] + 2
                tag = message[names_end]
                if tag == VERSION_TAG and message[names_end + 1] < 0x80:
                    names_end += message[names_end + 1] + 2
                    tag = message[names_end]
                start = names_end if tag != ID_TAG else id_end(message, names_end)
        except IndexError:
            names_end = start = 0
        lengths = self._young.get(message[:names_end])
        if lengths is not None:
            for layout, templates in lengths.get(size - start, ()):
                if layout.tail >= 0:  # the common case, kept short
                    tail = start + layout.tail
                    template = templates.get(message[start:tail])
                    if template is not None:
                        tensor = message[tail:] if size - tail < COPY_BELOW else memoryview(message)[tail:]
                        return template, (tensor,), message[names_end:start]
                else:
                    template = templates.get(layout.key(message, start))
                    if template is not None and (tensors := layout.tensors(message, start)) is not None:
                        return template, tensors, message[names_end:start]
        self._missed = names_end, start
        return self._revived(message, names_end, start) if self._old else None

    def _revived(self, message: bytes, names_end: int, start: int) -> Found | None:
        """As `find`, in the old generation; moves the template to the young one."""
        for layout, templates in self._old.get(message[:names_end], {}).get(len(message) - start, ()):
            template = templates.get(layout.key(message, start))
            if template is not None and (tensors := layout.tensors(message, start)) is not None:
                self._keep(message, names_end, start, layout, template)
                return template, tensors, message[names_end:start]
        return None

    def remember(
        self, message: bytes, template: RequestTemplate, order: Sequence[int], buffers: Sequence[Buffer], raw: bool
    ) -> None:
        """Keep the template of a message, if any message with the same bytes around its tensors must mean the same.

        `order`: the index of each model input in the message's inputs. `buffers`: their elements, in the model's order.
        `raw`: the message has raw contents. BYTES are never kept, since their elements must be checked.
        """
        names_end, start = self._missed
        names = message[:names_end]
        new = self._new.get(names, 0)
        if not new and len(self._new) >= KNOWN_TEMPLATES:
            self._new.clear()
        self._new[names] = new + 1
        if new > KNOWN_AT_ONCE and new % RARELY:
            return
        datatypes = [t.datatype for t in template.target.signature.inputs]
        if not datatypes or not all(d.itemsize and (raw or d.name in AS_RAW) for d in datatypes):
            return
        checks = () if raw else [AS_RAW[d.name] for d in datatypes]
        if len(message) - sum(map(len, buffers)) > KNOWN_LONGEST + start - names_end:
            return
        spans = tensor_spans(message, start)
        if spans is None or len(spans) != len(order):
            return
        for i, buffer in zip(order, buffers, strict=True):
            if not buffer or spans[i][1] - spans[i][0] != len(buffer):
                return
        spans = [(a - start, b - start) for a, b in spans]
        layout = Layout(spans, len(message) - start, order, checks)
        self._keep(message, names_end, start, layout, template)

    def _keep(self, message: bytes, names_end: int, start: int, layout: Layout, template: RequestTemplate) -> None:
        """Add a template to the young generation."""
        if self._count >= KNOWN_TEMPLATES or self._bytes >= KNOWN_BYTES:
            self._turn()
        layouts = self._young.setdefault(message[:names_end], {}).setdefault(len(message) - start, [])
        templates = next((templates for known, templates in layouts if known == layout), None)
        if templates is None:
            templates = {}
            if len(layouts) >= KNOWN_LAYOUTS:
                layouts.pop()  # the newest: earlier ones are more likely to be in common use
            layouts.append((layout, templates))
        key = layout.key(message, start)
        if key not in templates:
            self._count += 1
            self._bytes += names_end + len(key)
        templates[key] = template

    def _turn(self) -> None:
        """Replace the old generation with the young one."""
        self._old, self._young, self._new = self._young, {}, {}
        self._count = self._bytes = 0


def cut(message: bytes, start: int, end: int) -> Buffer:
    return message[start:end] if end - start < COPY_BELOW else memoryview(message)[start:end]


def id_end(message: bytes, start: int) -> int:
    """The end of the id field that starts at `start`; `start` itself, or IndexError, where the field is left to
    protobuf: not text, too long, empty, or truncated."""
    size = message[start + 1]
    text = start + 2
    if size >= 0x80:
        size += (message[text] << 7) - 0x80
        text += 1
        if not 0x80 <= size <= NAME_LIMIT:
            return start
    end = text + size
    if not size or end > len(message):
        return start
    if not message[text:end].isascii():
        try:
            message[text:end].decode()
        except UnicodeDecodeError:
            return start
    return end
