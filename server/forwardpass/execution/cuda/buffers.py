"""The buffers of one session on a device: for each tensor a region in page-locked host memory, and one on the device.

They are allocated once, for the largest batch; every batch is stacked into the first rows of the same regions.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.execution.cuda.driver import CudaError, Driver
from forwardpass.execution.cuda.graph_sizes import BufferRange, layout
from forwardpass.model.signature import ModelSignature, TensorSpec

MARKS = 4  # timing events: before the copy in, after it, after the run, after the copy out


class Block:
    """Memory for `rows` rows of some tensors, on the host and on the device."""

    def __init__(self, driver: Driver, tensors: Sequence[TensorSpec], rows: int) -> None:
        """Raises CudaError if there is not enough memory; then nothing is kept."""
        self.regions, nbytes = layout(tensors, rows)
        self._driver = driver
        self.host = driver.host_memory(nbytes)
        try:
            self.device = driver.device_memory(nbytes)
        except CudaError:
            driver.free_host(self.host)
            raise
        # Arrays over the page-locked memory; they must not be used once it is freed.
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.host))
        pairs = zip(self.regions, tensors, strict=True)
        self.arrays = [_view(memory, region, tensor, rows) for region, tensor in pairs]

    def addresses(self) -> list[int]:
        """The device addresses of the regions."""
        return [self.device + region.offset for region in self.regions]

    def to_device(self, rows: int, stream: int) -> None:
        """Enqueue a copy of the first `rows` rows of every tensor on the stream."""
        for offset, stride, _ in self.regions:
            self._driver.copy_in(self.device + offset, self.host + offset, rows * stride, stream)

    def to_host(self, places: Sequence[int], rows: int, stream: int) -> None:
        """Enqueue a copy of the first `rows` rows of the tensors at `places` on the stream."""
        for place in places:
            offset, stride, _ = self.regions[place]
            self._driver.copy_out(self.host + offset, self.device + offset, rows * stride, stream)

    def free(self) -> None:
        self.arrays = []
        _freed(self._driver.free_device, self.device)
        _freed(self._driver.free_host, self.host)


class PinnedBuffers:
    """A session's input and output buffers, and its timing events."""

    def __init__(self, driver: Driver, signature: ModelSignature, rows: int) -> None:
        """For batches of up to `rows` rows. Raises CudaError if there is not enough memory; then nothing is kept."""
        self.rows = rows
        self._driver = driver
        self.timing_events: list[int] = []
        with contextlib.ExitStack() as undo:
            self.inputs = Block(driver, signature.inputs, rows)
            undo.callback(self.inputs.free)
            self.outputs = Block(driver, signature.outputs, rows)
            undo.callback(self.outputs.free)
            for _ in range(MARKS):
                self.timing_events.append(driver.event())
                undo.callback(_freed, driver.end_event, self.timing_events[-1])
            undo.pop_all()

    def free(self) -> None:
        """Free everything. Memory that can't be freed because the device is lost is left to the end of the process."""
        self.inputs.free()
        self.outputs.free()
        for mark in self.timing_events:
            _freed(self._driver.end_event, mark)


def _view(memory: NDArray[np.uint8], region: BufferRange, tensor: TensorSpec, rows: int) -> NDArray[Any]:
    assert tensor.datatype.numpy is not None
    part = memory[region.offset : region.offset + rows * region.stride]
    return part.view(tensor.datatype.numpy).reshape(rows, *region.row)


def _freed(free: Callable[[int], None], what: int) -> None:
    with contextlib.suppress(CudaError):
        free(what)
