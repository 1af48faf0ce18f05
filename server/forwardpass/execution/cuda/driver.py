"""The calls of the CUDA runtime that the server makes itself: memory, streams, copies, events.

`Driver` is the interface, `Cudart` the library; tests use a driver whose device is ordinary memory. Every call that can
fail raises CudaError; devices, streams and events are plain numbers. As in CUDA, the calling thread determines which
device a call applies to.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_NON_BLOCKING = 1  # cudaStreamNonBlocking: it does not wait for the default stream
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal
_BUS_ID_BYTES = 64


class CudaError(Exception):
    """A call failed. `code` is the cudaError_t value; the text is the runtime's own."""

    def __init__(self, code: int, name: str, text: str) -> None:
        super().__init__(f"{text} ({name})")
        self.code = code


class Driver(Protocol):
    """The CUDA runtime calls that a session makes. Sizes are in bytes, addresses are numbers."""

    def devices(self) -> int:
        """The number of devices. Raises CudaError also if the driver is missing or too old."""

    def bus_id(self, device: int) -> str:
        """The PCI address of a device."""

    def use(self, device: int) -> None:
        """Select `device` for this thread, and exempt the thread from restrictions by captures in other threads."""

    def stream(self) -> int:
        """A new stream, which does not wait for the default stream."""

    def end_stream(self, stream: int) -> None: ...

    def host_memory(self, nbytes: int) -> int:
        """Page-locked host memory, which a device copies from and to while the CPU continues."""

    def free_host(self, address: int) -> None: ...

    def device_memory(self, nbytes: int) -> int:
        """Zeroed device memory."""

    def free_device(self, address: int) -> None: ...

    def copy_in(self, device: int, host: int, nbytes: int, stream: int) -> None:
        """Enqueue a copy from page-locked memory on the stream. Returns at once."""

    def copy_out(self, host: int, device: int, nbytes: int, stream: int) -> None:
        """Enqueue a copy to page-locked memory on the stream. Returns at once."""

    def wait(self, stream: int) -> None:
        """Wait until the stream's work is done. Raises CudaError if any earlier work failed."""

    def end_capture(self, stream: int) -> None:
        """End a failed capture, if the stream is in one: until then nothing can be freed."""

    def event(self) -> int: ...

    def end_event(self, event: int) -> None: ...

    def mark(self, event: int, stream: int) -> None:
        """Record the device's time when the stream reaches this point."""

    def between(self, first: int, second: int) -> float:
        """Seconds between two marks that the stream has passed."""

    def broken(self, stream: int) -> str:
        """The reason why nothing runs on this thread's device any more; empty if it still works."""


class Cudart:
    """libcudart. Thread-safe, as CUDA is."""

    def __init__(self, name: str) -> None:
        """Load the library `name`. Raises OSError with the loader's message."""
        # The interpreter's lock is released for calls that may take long, and kept for those that only enqueue:
        # reacquiring it from a busy thread can take longer than the call.
        self._waits: Any = ctypes.CDLL(name)
        self._enqueues: Any = ctypes.PyDLL(name)
        number, size = ctypes.c_void_p, ctypes.c_size_t
        for library in (self._waits, self._enqueues):
            library.cudaMemcpyAsync.argtypes = (number, number, size, ctypes.c_int, number)
            library.cudaEventRecord.argtypes = (number, number)
        self._waits.cudaGetErrorName.restype = self._waits.cudaGetErrorString.restype = ctypes.c_char_p
        for call in ("StreamSynchronize", "StreamDestroy", "FreeHost", "Free", "EventDestroy", "GraphDestroy"):
            getattr(self._waits, f"cuda{call}").argtypes = (number,)
        self._waits.cudaHostAlloc.argtypes = (number, size, ctypes.c_uint)
        self._waits.cudaMalloc.argtypes = (number, size)
        self._waits.cudaMemset.argtypes = (number, ctypes.c_int, size)
        self._waits.cudaStreamIsCapturing.argtypes = self._waits.cudaStreamEndCapture.argtypes = (number, number)
        self._waits.cudaEventElapsedTime.argtypes = (number, number, number)

    def _error(self, code: int) -> CudaError:
        name, text = self._waits.cudaGetErrorName(code), self._waits.cudaGetErrorString(code)
        self._waits.cudaGetLastError()  # clear it, or it would be reported by the next call
        return CudaError(code, name.decode(), text.decode())

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._waits, name)(*arguments)
        if code:
            raise self._error(code)

    def _made(self, name: str, *arguments: Any) -> int:
        """Call a function that returns a handle or address through its first argument."""
        made = ctypes.c_void_p()
        self._call(name, ctypes.byref(made), *arguments)
        return made.value or 0

    def devices(self) -> int:
        count = ctypes.c_int()
        self._call("cudaGetDeviceCount", ctypes.byref(count))
        return count.value

    def bus_id(self, device: int) -> str:
        text = ctypes.create_string_buffer(_BUS_ID_BYTES)
        self._call("cudaDeviceGetPCIBusId", text, _BUS_ID_BYTES, device)
        return text.value.decode()

    def use(self, device: int) -> None:
        self._call("cudaSetDevice", device)
        # ONNX Runtime captures in a mode in which a capture anywhere forbids every thread to allocate, except threads
        # in thread-local mode.
        mode = ctypes.c_int(_THREAD_LOCAL)
        self._call("cudaThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    def stream(self) -> int:
        return self._made("cudaStreamCreateWithFlags", ctypes.c_uint(_NON_BLOCKING))

    def end_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def host_memory(self, nbytes: int) -> int:
        return self._made("cudaHostAlloc", nbytes, 0)

    def free_host(self, address: int) -> None:
        self._call("cudaFreeHost", address)

    def device_memory(self, nbytes: int) -> int:
        address = self._made("cudaMalloc", nbytes)
        self._call("cudaMemset", address, 0, nbytes)
        self._call("cudaStreamSynchronize", None)  # the memset is on the default stream, which ours does not wait for
        return address

    def free_device(self, address: int) -> None:
        self._call("cudaFree", address)

    def copy_in(self, device: int, host: int, nbytes: int, stream: int) -> None:
        code = self._enqueues.cudaMemcpyAsync(device, host, nbytes, _TO_DEVICE, stream)
        if code:
            raise self._error(code)

    def copy_out(self, host: int, device: int, nbytes: int, stream: int) -> None:
        code = self._enqueues.cudaMemcpyAsync(host, device, nbytes, _TO_HOST, stream)
        if code:
            raise self._error(code)

    def wait(self, stream: int) -> None:
        code = self._waits.cudaStreamSynchronize(stream)
        if code:
            raise self._error(code)

    def end_capture(self, stream: int) -> None:
        status, graph = ctypes.c_int(), ctypes.c_void_p()
        self._waits.cudaStreamIsCapturing(stream, ctypes.byref(status))
        if status.value:
            self._waits.cudaStreamEndCapture(stream, ctypes.byref(graph))  # returns an error, as the capture is invalid
            if graph.value:
                self._waits.cudaGraphDestroy(graph.value)
        self._waits.cudaGetLastError()

    def event(self) -> int:
        return self._made("cudaEventCreateWithFlags", ctypes.c_uint(0))

    def end_event(self, event: int) -> None:
        self._call("cudaEventDestroy", event)

    def mark(self, event: int, stream: int) -> None:
        code = self._enqueues.cudaEventRecord(event, stream)
        if code:
            raise self._error(code)

    def between(self, first: int, second: int) -> float:
        milliseconds = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(milliseconds), first, second)
        return milliseconds.value * 1e-3

    def broken(self, stream: int) -> str:
        self._waits.cudaGetLastError()
        code = self._waits.cudaStreamSynchronize(stream)
        return str(self._error(code)) if code else ""
