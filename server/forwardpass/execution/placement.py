"""Where a network runs: the processor, or one or several CUDA devices; what was asked for, and what there is.

Nothing falls back by itself: CUDA that was asked for and cannot be had is an error that names what is missing. Only
`auto` chooses, and says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass

from forwardpass.errors import SettingsError
from forwardpass.execution.cuda.driver import CudaError, Cudart, Driver
from forwardpass.execution.onnx_runtime import ort

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
EXPECTED = "auto, cpu, cuda, cuda:N or cuda:N,M"
_DRIVER = "libcuda.so.1"  # comes with the device's driver, never with a package
# What ONNX Runtime's provider is linked with, each after what it needs itself. The provider must not be loaded here to
# find that out: it may only be by ONNX Runtime, which prepares it.
_LIBRARIES = (_DRIVER, "libcudart.so.{0}", "libcublasLt.so.{0}", "libcublas.so.{0}", "libcurand.so.10")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how a session runs, and why: printed at start-up."""

    provider: str  # "CPUExecutionProvider"
    device: int  # the first, where there are several
    threads: int  # inside one run
    why: str
    shared: bool = False  # those threads are one pool for all models
    devices: tuple[int, ...] = ()  # CUDA's numbers, ascending; none: the processor
    allow_tf32: bool = False  # products of 32-bit floats with 10 bits of mantissa
    memory_limit: int = 0  # bytes of a device that one session may take for its runs; 0: no limit

    @property
    def label(self) -> str:
        return f"cuda:{','.join(map(str, self.devices))}" if self.devices else "cpu"

    def on(self, device: int) -> Placement:
        """The same with one device alone."""
        return dataclasses.replace(self, device=device, devices=(device,))


@dataclass(frozen=True, slots=True)
class CudaDevices:
    """The CUDA devices there are; where there are none, `missing` says what is not there."""

    devices: int
    missing: str = ""


def place(
    wanted: str, threads: int, why: str, shared: bool = False, look: Callable[[], CudaDevices] | None = None
) -> Placement:
    """The placement for `wanted`: EXPECTED. Raises SettingsError for what is not to be had, naming what is missing.

    `look`: finds out what there is; None for this machine.
    """
    name, colon, numbers = wanted.partition(":")
    if name == "cpu" and not colon:
        return Placement(CPU, 0, threads, why, shared)
    if name not in ("auto", "cuda") or (colon and name == "auto"):
        raise SettingsError(f"provider: expected {EXPECTED}, got {wanted!r}")
    devices = _numbers(numbers, wanted) if colon else (0,)
    machine = (look or detect_cuda)()
    if name == "auto":
        if not machine.devices:
            return Placement(CPU, 0, threads, f"auto: cpu, because {machine.missing}; {why}", shared)
        why = f"auto: cuda:0, because {_count(machine.devices)} there; {why}"
    elif not machine.devices:
        raise SettingsError(f"provider: {wanted} cannot be had: {machine.missing}")
    elif devices[-1] >= machine.devices:
        raise SettingsError(
            f"provider: {wanted} cannot be had: there is no device {devices[-1]}; {_count(machine.devices)} there, "
            "counted from 0"
        )
    return Placement(CUDA, devices[0], threads, why, shared, devices)


def _numbers(text: str, wanted: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise SettingsError(f"provider: expected {EXPECTED}, got {wanted!r}")
    numbers = sorted({int(part) for part in parts})
    if len(numbers) != len(parts):
        raise SettingsError(f"provider: expected each device once, got {wanted!r}")
    return tuple(numbers)


def _count(devices: int) -> str:
    return "1 CUDA device is" if devices == 1 else f"{devices} CUDA devices are"


def detect_cuda() -> CudaDevices:
    """Load what CUDA needs and count its devices. The first time takes up to seconds where there is CUDA."""
    if CUDA not in ort.get_available_providers():
        return CudaDevices(
            0,
            f"this onnxruntime ({ort.__version__}) was built without CUDA: install forwardpass[gpu] in place of "
            "forwardpass[cpu]",
        )
    try:
        devices = driver().devices()
    except OSError as error:
        return CudaDevices(0, _missing(str(error)))
    except CudaError as error:
        return CudaDevices(0, f"CUDA says: {error}")
    return CudaDevices(devices, "" if devices else "CUDA counts no devices")


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
