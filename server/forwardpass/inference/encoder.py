"""Encodes a network's outputs as a ModelInferResponse. No I/O except writes to windows of shared memory.

A plain response has raw bytes: all except them and the id is made once for all requests of a template.
Classifications, typed contents and shared memory are slower, and used only on request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass import protocol
from forwardpass.errors import InvalidRequest
from forwardpass.execution.stacking import raw
from forwardpass.inference.parameters import OutputOptions, ResponseOptions
from forwardpass.inference.request_template import RequestTemplate
from forwardpass.model.signature import TensorSpec
from forwardpass.protocol.wire import RAW_OUT, varint
from forwardpass.transport.memory_budget import COUNTED_FROM

REMEMBERED_SHAPES = 16  # of responses, per template: more occur only where shapes depend on the data

Shapes = tuple[tuple[int, ...], ...]


def reply_parts(template: RequestTemplate, shapes: Shapes, sizes: tuple[int, ...]) -> tuple[bytes, ...]:
    """The bytes before the id field of a ModelInferResponse, and those before the bytes of each output.

    `shapes` and `sizes` (bytes) are those of the tensors to send, in the template's order of outputs.
    """
    target = template.target
    names = protocol.ModelInferResponse(model_name=target.name, model_version=target.version)
    response = protocol.ModelInferResponse()
    for place, shape in zip(template.outputs, shapes, strict=True):
        tensor = target.signature.outputs[place]
        response.outputs.add(name=tensor.name, datatype=tensor.datatype.name, shape=shape)
    parts = [RAW_OUT + varint(size) for size in sizes]
    parts[0] = response.SerializeToString() + parts[0]
    return (names.SerializeToString(), *parts)


def row_parts(template: RequestTemplate, trailing: tuple[int, ...], size: int) -> tuple[bytes, ...]:
    """The bytes before those of the only output, [rows, *trailing] of `size` bytes: all of them for a response without
    an id, and the parts before and after an id. Remembered in `template.replies` by `trailing`."""
    before, after = reply_parts(template, ((template.rows, *trailing),), (size,))
    return _remember(template, trailing, (before + after, before, after))


def encode_plain(template: RequestTemplate, id_field: bytes, arrays: Sequence[NDArray[Any]]) -> bytes:
    """The ModelInferResponse for one request, raw; `arrays` are its own rows of its requested outputs."""
    blobs = [raw(a) for a in arrays]
    shapes, sizes = tuple([a.shape for a in arrays]), tuple([len(b) for b in blobs])
    parts = template.replies.get((shapes, sizes))
    if parts is None:
        parts = _remember(template, (shapes, sizes), reply_parts(template, shapes, sizes))
    pieces = [parts[0], id_field]
    for part, blob in zip(parts[1:], blobs, strict=True):
        pieces += (part, blob)
    answer = b"".join(pieces)
    if len(answer) >= COUNTED_FROM:
        template.answer_bytes = len(answer)
    return answer


def _remember(template: RequestTemplate, key: Any, parts: tuple[bytes, ...]) -> tuple[bytes, ...]:
    if len(template.replies) >= REMEMBERED_SHAPES:
        template.replies.clear()
    template.replies[key] = parts
    return parts


def encode_with_options(
    template: RequestTemplate, id_field: bytes, response_options: ResponseOptions, arrays: Sequence[NDArray[Any]]
) -> bytes:
    """The ModelInferResponse for one request; `arrays` are its own rows of its requested outputs, in its order.

    Each output has an entry in the raw contents, empty if its elements went to shared memory: clients rely on the
    index. Raises InvalidRequest if an output does not fit its window, or the window no longer exists.
    """
    target = template.target
    response = protocol.ModelInferResponse(model_name=target.name, model_version=target.version)
    response.MergeFromString(id_field)
    batchable: bool = target.signature.batchable
    for place, wish, array in zip(template.outputs, response_options.outputs, arrays, strict=True):
        tensor: TensorSpec = target.signature.outputs[place]
        datatype = tensor.datatype
        if wish.classes:
            array = classify(array, tensor, wish.classes, batchable)
            datatype = protocol.DATATYPES["BYTES"]
        entry = response.outputs.add(name=tensor.name, datatype=datatype.name, shape=array.shape)
        if wish.window is not None:
            _write(entry, wish, tensor, raw(array))
            if not response_options.typed:
                response.raw_output_contents.append(b"")
        elif response_options.typed:
            assert datatype.contents is not None  # checked by `all_typed`
            values = array.ravel().tolist()
            if datatype.numpy is None:
                values = [v if isinstance(v, bytes) else str(v).encode() for v in values]
            getattr(entry.contents, datatype.contents).extend(values)
        else:
            response.raw_output_contents.append(raw(array))
    answer: bytes = response.SerializeToString()
    return answer


def _write(entry: Any, wish: OutputOptions, tensor: TensorSpec, data: bytes) -> None:
    assert wish.window is not None
    place = wish.window.place
    if len(data) > place.nbytes:
        raise InvalidRequest(
            f"output '{tensor.name}' has {len(data)} bytes, and its window of shared memory has {place.nbytes}"
        )
    wish.window.write(data)
    entry.parameters["shared_memory_region"].string_param = place.region
    entry.parameters["shared_memory_byte_size"].int64_param = len(data)
    if place.offset:
        entry.parameters["shared_memory_offset"].int64_param = place.offset


def classify(array: NDArray[Any], tensor: TensorSpec, classes: int, batchable: bool) -> NDArray[Any]:
    """The `classes` largest elements of each row, the largest first, each as b"value:index" or b"value:index:label".

    [B, ...] becomes [B, k], where k is at most the number of elements of a row; without a batch axis it becomes [k].
    Equal elements keep the order of their indices; NaN comes last.
    """
    array = tensor.datatype.widened(array)
    count_rows = len(array) if batchable else 1
    width = math.prod(array.shape[1:]) if batchable else array.size
    rows = array.reshape(count_rows, width)
    count = min(classes, width)
    floats = array.dtype.kind == "f"
    keys = np.where(np.isnan(rows), -np.inf, rows) if floats else rows
    # A stable ascending sort of the mirrored rows, so that of equal elements the first index ends up last.
    order = (width - 1 - np.argsort(keys[:, ::-1], axis=1, kind="stable"))[:, ::-1][:, :count]
    found = np.empty((len(rows), count), object)
    for i, chosen in enumerate(order.tolist()):
        for j, index in enumerate(chosen):
            value = rows[i, index]
            text = f"{float(value):f}:{index}" if floats else f"{int(value)}:{index}"
            if index < len(tensor.labels):
                text += f":{tensor.labels[index]}"
            found[i, j] = text.encode()
    return found if batchable else found[0]
