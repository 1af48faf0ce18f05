"""Where a session runs: the provider, the devices, the threads. The available ones are found by `providers`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

CPU, CUDA, OPENVINO = "CPUExecutionProvider", "CUDAExecutionProvider", "OpenVINOExecutionProvider"
NAMES = {CPU: "cpu", CUDA: "cuda", OPENVINO: "openvino"}  # in --provider and the metrics


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how a session runs, and the reason, printed at start-up."""

    provider: str  # "CPUExecutionProvider"
    device: int  # the first if there are several
    threads: int  # inside one run
    why: str
    shared: bool = False  # all models share one pool of these threads
    devices: tuple[int, ...] = ()  # CUDA's numbers, ascending; none: the CPU
    allow_tf32: bool = False  # 32-bit float products may use 10 bits of mantissa
    memory_limit: int = 0  # bytes of device memory for one session's runs; 0: no limit

    @property
    def label(self) -> str:
        name = NAMES[self.provider]
        return f"{name}:{','.join(map(str, self.devices))}" if self.devices else name

    @property
    def on_calling_thread(self) -> bool:
        """Whether a run is computed by the calling thread alone."""
        return self.provider == CPU and self.threads == 1 and not self.shared

    def on(self, device: int) -> Placement:
        """A copy with this device alone."""
        return dataclasses.replace(self, device=device, devices=(device,))


@dataclass(frozen=True, slots=True)
class Devices:
    """The number of a provider's devices; if 0, `missing` names what is missing."""

    count: int
    missing: str = ""
