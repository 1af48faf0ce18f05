"""Whether CUDA can be used here: what ONNX Runtime was built with, the libraries, the driver, the devices."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io

from forwardpass.execution.cuda.driver import CudaError, Cudart, Driver
from forwardpass.execution.onnx_runtime import ort
from forwardpass.execution.placement import CUDA, Devices

_DRIVER = "libcuda.so.1"  # comes with the device's driver, never with a package
# What ONNX Runtime's provider is linked with, each after what it needs itself. The provider must not be loaded here to
# find that out: it may only be by ONNX Runtime, which prepares it.
_LIBRARIES = (_DRIVER, "libcudart.so.{0}", "libcublasLt.so.{0}", "libcublas.so.{0}", "libcurand.so.10")


def detect_cuda() -> Devices:
    """Load what CUDA needs and count its devices. The first time takes up to seconds where there is CUDA."""
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
        return Devices(0, f"CUDA says: {error}")
    return Devices(devices, "" if devices else "CUDA counts no devices")


def _missing(text: str) -> str:
    """A loader's words, which begin with the library's name, and what to do."""
    if _DRIVER in text:
        return f"the device's driver cannot be loaded: {text}"
    return (
        f"a library of CUDA's cannot be loaded: {text}; forwardpass[gpu] brings them, or LD_LIBRARY_PATH says where "
        "they are"
    )


@functools.cache
def driver() -> Driver:
    """The CUDA runtime, with what ONNX Runtime's provider needs. Raises OSError naming a library that is not there."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(AttributeError):  # it prints, and older ones lack it
        ort.preload_dlls()
    version = str(getattr(ort, "cuda_version", "") or "13").partition(".")[0]
    names = [name.format(version) for name in _LIBRARIES]
    # ONNX Runtime itself only logs what it cannot load, and then goes on without CUDA.
    for name in names:
        ctypes.CDLL(name)
    return Cudart(names[1])
