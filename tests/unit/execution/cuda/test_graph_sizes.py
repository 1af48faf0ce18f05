"""Batch sizes with graphs, and where rows lie in the buffers: for every largest batch and every number of rows."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.made import signature, tensor

from forwardpass import protocol
from forwardpass.execution.cuda.graph_sizes import ALIGNMENT, choose, layout, obstacle, sizes
from forwardpass.model.signature import TensorSpec

LARGEST = st.integers(1, 5000)


@given(LARGEST)
def test_sizes_double_and_end_at_the_largest(largest: int) -> None:
    found = sizes(largest)
    assert found[0] == 1 and found[-1] == largest and list(found) == sorted(set(found))
    assert all(size & (size - 1) == 0 for size in found[:-1])  # powers of two
    assert len(found) <= 2 + math.log2(largest)


@pytest.mark.parametrize("largest", [0, -1])
def test_there_is_no_batch_without_rows(largest: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1 row, got {largest}"):
        sizes(largest)


@given(LARGEST, st.integers(-1, 6000))
def test_a_batch_goes_where_it_fits_and_nothing_smaller_would(largest: int, rows: int) -> None:
    found = sizes(largest)
    bucket = choose(found, rows, pads=True)
    if not 1 <= rows <= largest:
        assert bucket is None
        return
    assert bucket is not None and rows <= bucket and bucket in found
    assert all(size < rows for size in found if size < bucket)
    assert bucket < 2 * rows  # less than half of it is run for nothing
    assert choose(found, rows, pads=False) == (rows if rows in found else None)


def test_without_graphs_nothing_is_chosen() -> None:
    assert choose((), 1, pads=True) is None


tensors = st.builds(
    lambda name, row: TensorSpec("t", protocol.DATATYPES[name], (-1, *row)),
    st.sampled_from([name for name in protocol.DATATYPES if name != "BYTES"]),
    st.lists(st.integers(1, 9), max_size=3),
)


@given(st.lists(tensors, min_size=1, max_size=4), st.integers(1, 300))
def test_regions_are_apart_and_aligned(found: list[TensorSpec], rows: int) -> None:
    regions, nbytes = layout(found, rows)
    end = 0
    for region, one in zip(regions, found, strict=True):
        assert region.offset % ALIGNMENT == 0 and region.offset >= end
        assert region.stride == one.datatype.itemsize * math.prod(one.shape[1:]) and region.row == one.shape[1:]
        end = region.offset + rows * region.stride
    assert end <= nbytes < end + ALIGNMENT


@given(st.lists(tensors, min_size=1, max_size=4), st.integers(1, 300))
def test_rows_lie_where_they_would_in_a_smaller_batch(found: list[TensorSpec], rows: int) -> None:
    """So what an earlier batch left in a region is of the same tensor: it never turns numbers into indices."""
    regions, _ = layout(found, rows)
    address = {region.offset + row * region.stride for region in regions for row in range(rows)}
    assert len(address) == rows * len(regions)


@pytest.mark.parametrize(
    ("inputs", "outputs", "batchable", "why"),
    [
        ([tensor("x", "FP32", -1, 2)], [tensor("y", "FP16", -1)], True, ""),
        ([tensor("x", "FP32", 4, 2)], [tensor("y", "FP32", 4, 2)], False, "axis 0 is not a batch of any size"),
        ([tensor("x", "BYTES", -1, 2)], [tensor("y", "FP32", -1, 2)], True, "input 'x' is text"),
        ([tensor("x", "FP32", -1, 2)], [tensor("y", "BYTES", -1)], True, "output 'y' is text"),
        ([tensor("x", "FP32", -1, -1)], [tensor("y", "FP32", -1, 2)], True, "a row of input 'x' is of any size"),
        ([tensor("x", "FP32", -1, 2)], [tensor("y", "FP32", -1, -1)], True, "a row of output 'y' is of any size"),
        ([tensor("x", "FP32", -1, 0)], [tensor("y", "FP32", -1, 2)], True, "a row of input 'x' is empty"),
    ],
)
def test_what_cannot_lie_in_fixed_buffers_is_named(
    inputs: list[TensorSpec], outputs: list[TensorSpec], batchable: bool, why: str
) -> None:
    assert obstacle(signature(inputs, outputs, batchable)) == why
