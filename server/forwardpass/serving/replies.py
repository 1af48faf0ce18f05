"""A network's answer to a request that wants it another way than as raw bytes in the message: as classifications, as
typed contents, or in shared memory. Slow beside the plain way, and only for those who ask. No I/O but to the windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import InvalidRequest
from forwardpass.serving import protocol
from forwardpass.serving.interface import Tensor
from forwardpass.serving.matrix import raw
from forwardpass.serving.wire import Header
from forwardpass.serving.wishes import OutputWish, Wishes


def wished(header: Header, wishes: Wishes, arrays: Sequence[NDArray[Any]]) -> bytes:
    """The ModelInferResponse for one request; `arrays` are its own rows of the outputs that it wants, in its order.

    Each output has its place among the raw contents, an empty one where its elements went to shared memory: clients
    count by that. Raises InvalidRequest where an output does not fit its window, or the window is gone.
    """
    target = header.target
    response = protocol.ModelInferResponse(model_name=target.name, model_version=target.version, id=header.id)
    batchable: bool = target.interface.batchable
    for place, wish, array in zip(header.outputs, wishes.outputs, arrays, strict=True):
        tensor: Tensor = target.interface.outputs[place]
        datatype = tensor.datatype
        if wish.classes:
            array = classify(array, tensor, wish.classes, batchable)
            datatype = protocol.DATATYPES["BYTES"]
        entry = response.outputs.add(name=tensor.name, datatype=datatype.name, shape=array.shape)
        if wish.window is not None:
            _write(entry, wish, tensor, raw(array))
            if not wishes.typed:
                response.raw_output_contents.append(b"")
        elif wishes.typed:
            assert datatype.contents is not None  # checked when the wish was read
            values = array.ravel().tolist()
            if datatype.numpy is None:
                values = [v if isinstance(v, bytes) else str(v).encode() for v in values]
            getattr(entry.contents, datatype.contents).extend(values)
        else:
            response.raw_output_contents.append(raw(array))
    answer: bytes = response.SerializeToString()
    return answer


def _write(entry: Any, wish: OutputWish, tensor: Tensor, data: bytes) -> None:
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


def classify(array: NDArray[Any], tensor: Tensor, classes: int, batchable: bool) -> NDArray[Any]:
    """The `classes` largest elements of each row, the largest first, each as b"value:index" or b"value:index:label".

    [B, ...] becomes [B, k], where k is at most the number of elements of a row; an array that is no batch becomes [k].
    Equal elements keep the order of their indices; NaN comes last.
    """
    if tensor.datatype.name == "BF16":  # carried as its bits
        array = (array.astype(np.uint32) << 16).view(np.float32)
    count_rows = len(array) if batchable else 1
    width = math.prod(array.shape[1:]) if batchable else array.size
    rows = array.reshape(count_rows, width)
    count = min(classes, width)
    floats = array.dtype.kind == "f"
    keys = np.where(np.isnan(rows), -np.inf, rows) if floats else rows
    # Sorting is upwards and stable: of the mirrored rows, so that of equals the first index ends up last.
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
