"""The batch sizes that have a CUDA graph, and the layout of a batch in the buffers. Pure.

A CUDA graph is captured for one shape and one set of addresses. So there is one for each of 1, 2, 4 ... rows, all over
the same buffers, which have room for the largest batch: a smaller graph works on the first rows of each.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from forwardpass.model.signature import ModelSignature, TensorSpec

ALIGNMENT = 256  # bytes; that of cudaMalloc, and more than any kernel needs


def sizes(largest: int) -> tuple[int, ...]:
    """The rows of the graphs, ascending: 1, 2, 4 ... and `largest` itself, which must be at least 1."""
    if largest < 1:
        raise ValueError(f"largest: expected at least 1 row, got {largest}")
    found = [1]
    while found[-1] < largest:
        found.append(min(largest, 2 * found[-1]))
    return tuple(found)


def choose(graph_sizes: Sequence[int], rows: int, pads: bool) -> int | None:
    """The graph size to run `rows` rows in; None if there is none, and they must run at their exact size.

    `pads`: a larger graph may be used, since rows are independent; the results of the padding rows are discarded.
    """
    place = bisect_left(graph_sizes, rows)
    if rows < 1 or place == len(graph_sizes):
        return None
    return graph_sizes[place] if pads or graph_sizes[place] == rows else None


class BufferRange(NamedTuple):
    """Where one tensor of a batch lies in a block of memory."""

    offset: int  # bytes from the block's start
    stride: int  # bytes of one row
    row: tuple[int, ...]  # shape of one row


def layout(tensors: Sequence[TensorSpec], rows: int) -> tuple[tuple[BufferRange, ...], int]:
    """A region for `rows` rows of each tensor, one after the other, and the total bytes.

    A region's place does not depend on the batch, so padding rows hold earlier values of the same tensor: an index
    stays an index. Tensors must have fixed-size elements and rows of fixed shape.
    """
    regions, end = [], 0
    for tensor in tensors:
        stride = tensor.datatype.itemsize * math.prod(tensor.shape[1:])
        regions.append(BufferRange(end, stride, tensor.shape[1:]))
        end += -(-rows * stride // ALIGNMENT) * ALIGNMENT
    return tuple(regions), end


def obstacle(signature: ModelSignature) -> str:
    """The reason why a network's batches cannot lie in fixed buffers; empty if they can."""
    if not signature.batchable:
        return "axis 0 is not a batch of any size"
    for what, tensors in (("input", signature.inputs), ("output", signature.outputs)):
        for tensor in tensors:
            if tensor.datatype.numpy is None:
                return f"{what} '{tensor.name}' is text"
            if any(size < 0 for size in tensor.shape[1:]):
                return f"a row of {what} '{tensor.name}' is of any size"
            if 0 in tensor.shape[1:]:
                return f"a row of {what} '{tensor.name}' is empty"
    return ""
