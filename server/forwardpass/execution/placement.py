"""Where a session runs: the provider, the devices, the threads. Which there are, `providers` knows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

CPU, CUDA, OPENVINO = "CPUExecutionProvider", "CUDAExecutionProvider", "OpenVINOExecutionProvider"
NAMES = {CPU: "cpu", CUDA: "cuda", OPENVINO: "openvino"}  # as --provider and the metrics have them


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
        name = NAMES[self.provider]
        return f"{name}:{','.join(map(str, self.devices))}" if self.devices else name

    @property
    def on_calling_thread(self) -> bool:
        """Whether a run is computed by the thread that asks for it, and by no other."""
        return self.provider == CPU and self.threads == 1 and not self.shared

    def on(self, device: int) -> Placement:
        """The same with one device alone."""
        return dataclasses.replace(self, device=device, devices=(device,))


@dataclass(frozen=True, slots=True)
class Devices:
    """How many devices of a provider there are; where there are none, `missing` says what is not there."""

    count: int
    missing: str = ""
