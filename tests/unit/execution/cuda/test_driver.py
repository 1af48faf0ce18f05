"""The CUDA runtime by ctypes: on a machine without a device every call must give its own words, and none may crash."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from forwardpass.execution.cuda.driver import CudaError, Cudart


def library() -> str:
    for version in (13, 12):
        try:
            ctypes.CDLL(f"libcudart.so.{version}")
        except OSError:
            continue
        return f"libcudart.so.{version}"
    return ""


NAME = library()
needs_cudart = pytest.mark.skipif(not NAME, reason="libcudart.so.13 and .12 are not on the loader's path")


def no_device() -> bool:
    try:
        return Cudart(NAME).devices() == 0
    except CudaError:
        return True


def test_a_library_that_is_not_there_is_named() -> None:
    with pytest.raises(OSError, match=r"libnothing\.so\.1"):
        Cudart("libnothing.so.1")


@needs_cudart
@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.devices(),
        lambda c: c.bus_id(0),
        lambda c: c.use(0),
        lambda c: c.stream(),
        lambda c: c.host_memory(4096),
        lambda c: c.device_memory(4096),
        lambda c: c.event(),
    ],
    ids=["devices", "bus_id", "use", "stream", "host_memory", "device_memory", "event"],
)
def test_without_a_device_every_call_says_why(call: Any) -> None:
    if not no_device():
        pytest.skip("there is a CUDA device: tests/gpu is for that")
    with pytest.raises(CudaError) as caught:
        call(Cudart(NAME))
    text = str(caught.value)
    assert caught.value.code in (35, 100, 999) and "(cudaError" in text  # driver too old, or missing; no device
