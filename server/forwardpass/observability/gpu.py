"""GPU metrics: the times of every batch on one, reported by sessions; utilisation and memory, read at a scrape.

The latter come from NVML through nvidia-ml-py, which the extra `gpu` installs. Without it those gauges have no samples,
that is logged once, and everything else works.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from forwardpass.observability import catalogue
from forwardpass.observability.catalogue import SampleSink
from forwardpass.observability.histogram import Histogram

logger = logging.getLogger(__name__)

STAGES = ("copy_in", "run", "copy_out")
# How a batch was run: by a captured graph; in fixed buffers, kernel by kernel; or with copies made by the runtime.
RunKind = Literal["graph", "bound", "plain"]
# Seconds. A copy of a few rows takes a few microseconds, a replay of a small graph ten.
BOUNDS = (
    2e-6, 5e-6, 10e-6, 15e-6, 20e-6, 30e-6, 50e-6, 75e-6, 100e-6, 150e-6, 200e-6, 300e-6, 500e-6, 1e-3, 2e-3, 5e-3,
    10e-3, 20e-3, 50e-3, 0.1, 0.5, 1.0,
)  # fmt: skip
FOLD_AT = 100  # batches recorded before they are folded into the histograms


class GpuBatchRecord(NamedTuple):
    """One batch run on a device. Times in seconds; None if it was not timed, or its copies not separately."""

    device: int  # CUDA's number, as in cuda:N
    way: RunKind
    copy_in: float | None = None
    run: float | None = None
    copy_out: float | None = None


class GpuMetrics:
    """The times of one model version's batches on its devices. Thread-safe; `ran` is called once per batch."""

    def __init__(self) -> None:
        self._notes: deque[GpuBatchRecord] = deque()
        self._stages: dict[tuple[int, str], Histogram] = {}
        self._batches: Counter[tuple[int, RunKind]] = Counter()
        self._lock = threading.Lock()

    def ran(self, note: GpuBatchRecord) -> None:
        """Record a batch. From any thread; costs an append, and every hundredth time a millisecond at most."""
        self._notes.append(note)
        if len(self._notes) >= FOLD_AT:
            with self._lock:
                self._fold()

    def _fold(self) -> None:
        """Fold the records made since into the histograms. Lock held; records may be added meanwhile."""
        notes = [self._notes.popleft() for _ in range(len(self._notes))]
        self._batches.update((note.device, note.way) for note in notes)
        took: dict[tuple[int, str], list[float]] = {}
        for note in notes:
            for stage, seconds in zip(STAGES, (note.copy_in, note.run, note.copy_out), strict=True):
                if seconds is not None:
                    took.setdefault((note.device, stage), []).append(seconds)
        for key, times in took.items():
            self._stages.setdefault(key, Histogram(BOUNDS)).record(times, [1] * len(times))

    def snapshot(self, labels: tuple[str, str], samples: SampleSink) -> None:
        """Add the samples of the model version `labels` to `samples`; none if nothing ran on a GPU."""
        with self._lock:
            self._fold()
            for (device, stage), histogram in self._stages.items():
                samples.add_histogram(catalogue.GPU_STAGE_SECONDS, (*labels, f"cuda:{device}", stage), histogram)
            for (device, way), count in self._batches.items():
                samples.add(catalogue.GPU_BATCHES_TOTAL, (*labels, f"cuda:{device}", way), count)


def load_nvml() -> Any:
    """The module of nvidia-ml-py. Raises ImportError if it is not installed."""
    import pynvml

    return pynvml


class GpuReader:
    """Utilisation and memory of the devices in use, by NVML. Thread-safe.

    - Nothing is loaded before the first scrape with a device, and nothing is read except at a scrape.
    - A value that can't be read has no sample and is logged once; no scrape fails because of it.
    """

    def __init__(self, bus_id: Callable[[int], str], load: Callable[[], Any] = load_nvml) -> None:
        """`bus_id` returns the PCI address of CUDA's device N, since NVML numbers devices in its own order."""
        self._bus_id = bus_id
        self._load = load
        self._nvml: Any = None
        self._handles: dict[int, Any] = {}
        self._told: set[tuple[int, str]] = set()  # already logged: device and the value that could not be read
        self._absent = False
        self._lock = threading.Lock()

    def collect(self, devices: Iterable[int], samples: SampleSink) -> None:
        """Add the samples of CUDA's `devices` to `samples`."""
        with self._lock:
            for device in sorted(set(devices)):
                if not self._ready():
                    return
                self._read(device, samples)

    def _ready(self) -> bool:
        """Whether NVML is available; tried once."""
        if self._nvml is None and not self._absent:
            try:
                nvml = self._load()
                nvml.nvmlInit()
                self._nvml = nvml
            except Exception as error:
                self._absent = True
                why = "nvidia-ml-py is not installed" if isinstance(error, ImportError) else f"NVML: {error}"
                logger.warning("utilisation and memory of GPUs will not be in the metrics: %s", why)
        return self._nvml is not None

    def _read(self, device: int, samples: SampleSink) -> None:
        label = (f"cuda:{device}",)
        nvml = self._nvml
        try:
            if device not in self._handles:
                self._handles[device] = nvml.nvmlDeviceGetHandleByPciBusId(self._bus_id(device))
        except Exception as error:
            self._tell(device, "handle", error)
            return
        handle = self._handles[device]
        # Read separately: a slice of a GPU (MIG) has memory, and no utilisation of its own.
        try:
            samples.add(catalogue.GPU_UTILIZATION_RATIO, label, nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
        except Exception as error:
            self._tell(device, "utilisation", error)
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            samples.add(catalogue.GPU_MEMORY_USED_BYTES, label, memory.used)
            samples.add(catalogue.GPU_MEMORY_TOTAL_BYTES, label, memory.total)
        except Exception as error:
            self._tell(device, "memory", error)

    def _tell(self, device: int, what: str, error: Exception) -> None:
        if (device, what) not in self._told:
            self._told.add((device, what))
            logger.warning(
                "cuda:%d: its %s cannot be read by NVML, so it is not in the metrics: %s", device, what, error
            )
