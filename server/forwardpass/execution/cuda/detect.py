"""Detects whether CUDA can be used: ONNX Runtime's build, the libraries, the driver, the devices."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io

from forwardpass.execution.cuda.driver import CudaError, Cudart, Driver
from forwardpass.execution.onnx_runtime import ort
from forwardpass.execution.placement import CUDA, Devices

_DRIVER = "libcuda.so.1"  # comes with the device's driver, never with a package
# The libraries that ONNX Runtime's provider is linked with, each after its own dependencies. The provider itself must
# not be loaded here: only ONNX Runtime, which prepares it, may do so.
_LIBRARIES = (_DRIVER, "libcudart.so.{0}", "libcublasLt.so.{0}", "libcublas.so.{0}", "libcurand.so.10")


def detect_cuda() -> Devices:
    """Load CUDA's libraries and count the devices. With CUDA, the first call may take seconds."""
    if CUDA not in ort.get_available_providers():
        return Devices(
            0,
            f"this onnxruntime ({ort.__version__}) was built without CUDA: install forwardpass[gpu] in place of "
            "forwardpass[cpu]",
        )
    try:
        devices = driver().devices()
    except OSError as error:
        return Devices(0, _missing(str(error)))
    except CudaError as error:
        return Devices(0, f"CUDA reports: {error}")
    return Devices(devices, "" if devices else "CUDA counts no devices")


def _missing(text: str) -> str:
    """The loader's error, which begins with the library's name, and the remedy."""
    if _DRIVER in text:
        return f"the device's driver cannot be loaded: {text}"
    return (
        f"a library of CUDA's cannot be loaded: {text}; forwardpass[gpu] brings them, or LD_LIBRARY_PATH must name "
        "their folder"
    )


@functools.cache
def driver() -> Driver:
    """The CUDA runtime, with the libraries of ONNX Runtime's provider. Raises OSError naming a missing library."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(AttributeError):  # it prints, and older versions lack it
        ort.preload_dlls()
    version = str(getattr(ort, "cuda_version", "") or "13").partition(".")[0]
    names = [name.format(version) for name in _LIBRARIES]
    # ONNX Runtime itself only logs a library that it cannot load, and continues without CUDA.
    for name in names:
        ctypes.CDLL(name)
    return Cudart(names[1])
