"""The batch sizes that a device has a graph for, and where the rows of a batch lie in its buffers. Pure.

A CUDA graph is captured for one shape and one set of addresses. So there is one for 1, 2, 4 ... rows, all of them over
the same buffers, each of which has room for the largest batch: a smaller graph works on the first rows of each.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from forwardpass.model.signature import ModelSignature, TensorSpec

ALIGNMENT = 256  # bytes; what cudaMalloc gives, and more than any kernel asks for


def sizes(largest: int) -> tuple[int, ...]:
    """1, 2, 4 ... and `largest` itself, which must be at least 1: rows of the graphs, ascending."""
    if largest < 1:
        raise ValueError(f"largest: expected at least 1 row, got {largest}")
    found = [1]
    while found[-1] < largest:
        found.append(min(largest, 2 * found[-1]))
    return tuple(found)


def choose(graph_sizes: Sequence[int], rows: int, pads: bool) -> int | None:
    """The graph_size that `rows` rows are run in; None where there is none, and they are run at their exact size.

    `pads`: a larger one will do, since rows are independent; the rows beyond the batch are run for nothing.
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
    """A region for `rows` rows of each tensor, one after the other, and the bytes of all.

    A region's place does not depend on the batch, so that what is left in it of earlier ones is of the same tensor: an
    index stays an index. Tensors must be of fixed-size elements and rows of fixed shape.
    """
    regions, end = [], 0
    for tensor in tensors:
        stride = tensor.datatype.itemsize * math.prod(tensor.shape[1:])
        regions.append(BufferRange(end, stride, tensor.shape[1:]))
        end += -(-rows * stride // ALIGNMENT) * ALIGNMENT
    return tuple(regions), end


def obstacle(signature: ModelSignature) -> str:
    """Why a network's batches cannot lie in fixed buffers; empty where they can."""
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
