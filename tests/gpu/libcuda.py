"""What the tests ask of the CUDA driver itself, by ctypes: what memory is taken, and an error that nothing survives."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

# A kernel that ends its context: from then on every call in it fails ("unspecified launch failure").
_PTX = b".version 7.0\n.target sm_75\n.address_size 64\n.visible .entry spoil() { trap; ret; }\n\0"


class DriverError(Exception):
    """A call of the driver failed; the text has its name and number."""


@functools.cache
def _library() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_library(), name)(*arguments)
    if code:
        raise DriverError(f"{name} gave {code}")


def _enter(device: int) -> None:
    """Make the context that everything in this process shares this thread's own."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _call("cuInit", 0)
    _call("cuDeviceGet", ctypes.byref(handle), device)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    _call("cuCtxSetCurrent", context)


def used_memory(device: int = 0) -> int:
    """Bytes that are taken on a device, by all processes."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _enter(device)
    _call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return total.value - free.value


def spoil(device: int = 0) -> None:
    """Run a kernel that traps: this process can do nothing more on the device."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _enter(device)
    _call("cuModuleLoadData", ctypes.byref(module), _PTX)
    _call("cuModuleGetFunction", ctypes.byref(function), module, b"spoil")
    _call("cuLaunchKernel", function, *(ctypes.c_uint(1),) * 6, ctypes.c_uint(0), None, None, None)
    code = _library().cuCtxSynchronize()
    if not code:
        raise DriverError("the kernel did not trap")
