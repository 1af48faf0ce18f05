"""Where networks run: what may be asked for, what is chosen, and the words when it cannot be had."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from forwardpass.errors import SettingsError
from forwardpass.execution.cuda import detect
from forwardpass.execution.cuda.detect import detect_cuda
from forwardpass.execution.cuda.driver import CudaError
from forwardpass.execution.placement import CPU, CUDA, Devices
from forwardpass.execution.providers import place

NONE = Devices(0, "nobody brought one")
TWO = Devices(2)


def looked(machine: Devices) -> Any:
    return lambda: machine


@pytest.mark.parametrize(
    ("wanted", "machine", "label", "why"),
    [
        ("cpu", TWO, "cpu", "so I say"),
        ("cpu", NONE, "cpu", "so I say"),
        ("auto", NONE, "cpu", "auto: cpu, because nobody brought one; so I say"),
        ("auto", Devices(1), "cuda:0", "auto: cuda:0, because 1 CUDA device is there; so I say"),
        ("auto", TWO, "cuda:0", "auto: cuda:0, because 2 CUDA devices are there; so I say"),
        ("cuda", TWO, "cuda:0", "so I say"),
        ("cuda:1", TWO, "cuda:1", "so I say"),
        ("cuda:1,0", TWO, "cuda:0,1", "so I say"),
    ],
)
def test_what_was_asked_for_or_chosen(wanted: str, machine: Devices, label: str, why: str) -> None:
    found = place(wanted, 3, "so I say", look=looked(machine))
    assert (found.label, found.threads, found.why) == (label, 3, why)
    assert found.provider == (CPU if label == "cpu" else CUDA)
    assert found.devices == (() if label == "cpu" else tuple(map(int, label[5:].split(","))))


@pytest.mark.parametrize(
    ("wanted", "machine", "text"),
    [
        ("cuda", NONE, "provider: cuda cannot be had: nobody brought one"),
        ("cuda:0,1", NONE, "provider: cuda:0,1 cannot be had: nobody brought one"),
        ("cuda:1", Devices(1), "provider: cuda:1 cannot be had: there is no device 1; 1 CUDA device is there"),
        ("cuda:0,2", TWO, "provider: cuda:0,2 cannot be had: there is no device 2; 2 CUDA devices are there"),
        ("cuda:0,0", TWO, "provider: expected each device once, got 'cuda:0,0'"),
    ],
)
def test_cuda_that_cannot_be_had_is_an_error(wanted: str, machine: Devices, text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        place(wanted, 1, "", look=looked(machine))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "wanted", ["gpu", "", "CPU", "cpu:0", "auto:0", "cuda:", "cuda:x", "cuda:-1", "cuda:0,", "cuda:²", "tensorrt:0"]
)
def test_an_unknown_provider_is_named(wanted: str) -> None:
    with pytest.raises(SettingsError, match="provider: expected auto, cpu, cuda") as caught:
        place(wanted, 1, "", look=looked(TWO))
    assert repr(wanted) in str(caught.value)


def test_one_of_several_devices() -> None:
    both = place("cuda:0,1", 1, "", look=looked(TWO))
    assert (both.device, both.on(1).device, both.on(1).devices, both.on(1).label) == (0, 1, (1,), "cuda:1")


# -- this machine -----------------------------------------------------------------------------------------------------


def runtime(monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    """Let ONNX Runtime be one with CUDA, as far as looking at the machine goes."""
    found = SimpleNamespace(
        __version__="1.31.1", cuda_version="13.0", get_available_providers=lambda: [CUDA, CPU], **more
    )
    monkeypatch.setattr(detect, "ort", found)
    detect.driver.cache_clear()


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Any:
    yield
    detect.driver.cache_clear()


def test_an_onnxruntime_without_cuda_says_which_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(__version__="1.32.0", get_available_providers=lambda: ["AzureExecutionProvider", CPU])
    monkeypatch.setattr(detect, "ort", found)
    machine = detect_cuda()
    assert machine.count == 0
    assert "onnxruntime (1.32.0) was built without CUDA" in machine.missing
    assert "install forwardpass[gpu] in place of forwardpass[cpu]" in machine.missing


def loads(monkeypatch: pytest.MonkeyPatch, missing: str, devices: Any) -> list[str]:
    """Let every library be loaded but `missing`; the names that were tried."""
    tried: list[str] = []

    def load(name: str) -> None:
        tried.append(name)
        if name == missing:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(detect.ctypes, "CDLL", load)
    monkeypatch.setattr(detect, "Cudart", lambda _: SimpleNamespace(devices=devices))
    return tried


@pytest.mark.parametrize(
    ("missing", "advice"),
    [
        ("libcuda.so.1", "the device's driver cannot be loaded: libcuda.so.1: cannot open shared object file"),
        ("libcudart.so.13", "forwardpass[gpu] brings them"),
        ("libcublasLt.so.13", "a library of CUDA's cannot be loaded: libcublasLt.so.13: cannot open"),
        ("libcurand.so.10", "LD_LIBRARY_PATH must name their folder"),
    ],
)
def test_a_library_that_is_missing_is_named_in_the_loaders_words(
    monkeypatch: pytest.MonkeyPatch, missing: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime(monkeypatch, preload_dlls=lambda: print("Failed to load something"))
    loads(monkeypatch, missing, lambda: 1)
    found = detect_cuda().missing
    assert missing in found and advice in found
    assert not capsys.readouterr().out  # standard output is for what the server says


def test_what_the_driver_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime(monkeypatch)  # one that has no preload_dlls

    def devices() -> int:
        raise CudaError(
            35, "cudaErrorInsufficientDriver", "CUDA driver version is insufficient for CUDA runtime version"
        )

    tried = loads(monkeypatch, "", devices)
    assert detect_cuda() == Devices(
        0, "CUDA reports: CUDA driver version is insufficient for CUDA runtime version (cudaErrorInsufficientDriver)"
    )
    assert tried[0] == "libcuda.so.1" and "libcublas.so.13" in tried


@pytest.mark.parametrize(("count", "machine"), [(3, Devices(3)), (0, Devices(0, "CUDA counts no devices"))])
def test_devices_are_counted(monkeypatch: pytest.MonkeyPatch, count: int, machine: Devices) -> None:
    runtime(monkeypatch, preload_dlls=lambda: None)
    loads(monkeypatch, "", lambda: count)
    assert detect_cuda() == machine
