"""The supported execution providers, one row each: how it is detected, requested and opened.

There is no implicit fallback: a requested provider that is not available is an error that names what is missing. Only
`auto` chooses, and gives the reason. A new provider needs a row here, and its own session if OrtSession does not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from forwardpass.errors import SettingsError
from forwardpass.execution.cuda.detect import detect_cuda
from forwardpass.execution.cuda.session import CudaSession
from forwardpass.execution.openvino_session import OpenVinoSession, detect_openvino
from forwardpass.execution.ort_session import OrtSession
from forwardpass.execution.placement import CPU, CUDA, OPENVINO, Devices, Placement
from forwardpass.execution.session import Session


class OpenSession(Protocol):
    """Opens the network in `path` at `placement`, on its first device if it has any. Raises ModelError.

    `optimizations`: allowed graph optimizations: none, basic, extended or all. `name`: of its own thread, if any.
    `opening` is called with ONNX Runtime's session options before the network is opened, to add to them, or so that it
    can be cancelled; CUDA's sessions, whose options are fixed, do not call it.
    """

    def __call__(
        self,
        path: Path,
        placement: Placement,
        optimizations: str = "all",
        name: str = "session",
        opening: Callable[[Any], None] = lambda _: None,
    ) -> Session: ...


@dataclass(frozen=True, slots=True)
class Provider:
    """One execution provider."""

    name: str  # in --provider
    ort_name: str  # in ONNX Runtime
    open: OpenSession
    detect: Callable[[], Devices] | None = None  # finds its devices; None: always available
    numbered: bool = False  # its devices are numbered: NAME:N or NAME:N,M


def _open_without_device(
    kind: type[OrtSession],
    path: Path,
    placement: Placement,
    optimizations: str = "all",
    name: str = "session",  # noqa: ARG001
    opening: Callable[[Any], None] = lambda _: None,
) -> Session:
    return kind(path, placement, optimizations, opening=opening)


def _open_on_cuda(
    path: Path,
    placement: Placement,
    optimizations: str = "all",
    name: str = "session",
    opening: Callable[[Any], None] = lambda _: None,  # noqa: ARG001
) -> Session:
    return CudaSession(path, placement.on(placement.device), optimizations, name=name)


PROVIDERS = (
    Provider("cpu", CPU, partial(_open_without_device, OrtSession)),
    Provider("cuda", CUDA, _open_on_cuda, detect_cuda, numbered=True),
    Provider("openvino", OPENVINO, partial(_open_without_device, OpenVinoSession), detect_openvino),
)
_BY_NAME = {provider.name: provider for provider in PROVIDERS}
_BY_ORT_NAME = {provider.ort_name: provider for provider in PROVIDERS}
EXPECTED = "auto, cpu, cuda, cuda:N, cuda:N,M or openvino"


def open_session(
    path: Path,
    placement: Placement,
    optimizations: str = "all",
    name: str = "session",
    opening: Callable[[Any], None] = lambda _: None,
) -> Session:
    """As OpenSession, with the provider of `placement`."""
    return _BY_ORT_NAME[placement.provider].open(path, placement, optimizations, name, opening)


def place(
    wanted: str, threads: int, why: str, shared: bool = False, look: Callable[[], Devices] | None = None
) -> Placement:
    """The placement for `wanted`, one of EXPECTED. Raises SettingsError naming what is missing if it is not available.

    `look`: counts the CUDA devices; None: those of this machine.
    """
    name, colon, numbers = wanted.partition(":")
    provider = _BY_NAME.get("cuda" if name == "auto" else name)
    if provider is None or (colon and (name == "auto" or not provider.numbered)):
        raise SettingsError(f"provider: expected {EXPECTED}, got {wanted!r}")
    if provider.detect is None:
        return Placement(provider.ort_name, 0, threads, why, shared)
    devices = _numbers(numbers, wanted) if colon else (0,)
    there = (look if look is not None and provider.numbered else provider.detect)()
    if name == "auto":
        if not there.count:
            return Placement(CPU, 0, threads, f"auto: cpu, because {there.missing}; {why}", shared)
        why = f"auto: cuda:0, because {_count(there.count)} there; {why}"
    elif not there.count:
        raise SettingsError(f"provider: {wanted} cannot be had: {there.missing}")
    if not provider.numbered:
        return Placement(provider.ort_name, 0, threads, why, shared)
    if devices[-1] >= there.count:
        raise SettingsError(
            f"provider: {wanted} cannot be had: there is no device {devices[-1]}; {_count(there.count)} there, "
            "counted from 0"
        )
    return Placement(provider.ort_name, devices[0], threads, why, shared, devices)


def available() -> list[str]:
    """The values of --provider available on this machine, one for each device; the CPU first."""
    found: list[str] = []
    for provider in PROVIDERS:
        if provider.detect is None:
            found.append(provider.name)
        else:
            count = provider.detect().count
            found += [f"{provider.name}:{n}" for n in range(count)] if provider.numbered else [provider.name] * count
    return found


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
