"""What of the CUDA runtime the server calls itself: memory, streams, copies, events. ONNX Runtime does the rest.

`Driver` is the seam: `Cudart` is the library, and tests bring one whose device is ordinary memory. Every call that can
fail raises CudaError; a device, a stream and an event are plain numbers. Which device a call is about is a property of
the calling thread, as in CUDA.
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
    """A call failed. `code` is cudaError_t's number; the text is the runtime's own."""

    def __init__(self, code: int, name: str, text: str) -> None:
        super().__init__(f"{text} ({name})")
        self.code = code


class Driver(Protocol):
    """The calls of the CUDA runtime that a session makes. Sizes in bytes, addresses as numbers."""

    def devices(self) -> int:
        """How many there are. Raises CudaError also where the driver is missing or too old."""

    def bus_id(self, device: int) -> str:
        """The PCI address of a device."""

    def use(self, device: int) -> None:
        """Let this thread's calls be about `device`, and let captures in other threads not forbid it anything."""

    def stream(self) -> int:
        """A new stream, which does not wait for the default one."""

    def end_stream(self, stream: int) -> None: ...

    def host_memory(self, nbytes: int) -> int:
        """Page-locked memory of the host, which a device copies from and to while the processor goes on."""

    def free_host(self, address: int) -> None: ...

    def device_memory(self, nbytes: int) -> int:
        """Memory of the device, all zeros."""

    def free_device(self, address: int) -> None: ...

    def copy_in(self, device: int, host: int, nbytes: int, stream: int) -> None:
        """Copy from page-locked memory, in the stream's order. Returns at once."""

    def copy_out(self, host: int, device: int, nbytes: int, stream: int) -> None:
        """Copy to page-locked memory, in the stream's order. Returns at once."""

    def wait(self, stream: int) -> None:
        """Wait until all is done. Raises what went wrong in anything before."""

    def end_capture(self, stream: int) -> None:
        """Leave a capture that failed halfway, if the stream is in one: nothing can be freed before."""

    def event(self) -> int: ...

    def end_event(self, event: int) -> None: ...

    def mark(self, event: int, stream: int) -> None:
        """Note the time on the device when the stream comes here."""

    def between(self, first: int, second: int) -> float:
        """Seconds from one mark to another that are both past."""

    def broken(self, stream: int) -> str:
        """Why nothing runs on this thread's device any more; empty where an error has left no traces."""


class Cudart:
    """libcudart. Thread-safe, as CUDA is."""

    def __init__(self, name: str) -> None:
        """Load the library `name`. Raises OSError with the loader's words."""
        # The interpreter's lock is let go for what may take long, and kept for what only enqueues: to get it back
        # from a busy thread can take longer than the call.
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
        self._waits.cudaGetLastError()  # or it would be taken for that of the next call
        return CudaError(code, name.decode(), text.decode())

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._waits, name)(*arguments)
        if code:
            raise self._error(code)

    def _made(self, name: str, *arguments: Any) -> int:
        """What a call puts where its first argument points to."""
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
        # ONNX Runtime captures in the mode in which a capture anywhere forbids every thread to allocate, unless the
        # thread has said that it keeps to itself.
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
        self._call("cudaStreamSynchronize", None)  # that is in the default stream, for which ours does not wait
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
            self._waits.cudaStreamEndCapture(stream, ctypes.byref(graph))  # an error says that it was spoilt: it is
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
