"""Metrics of GPUs: batches on devices as a scraper sees them, and NVML through a module that stands in for it.

The stand-in is at the one seam where nvidia-ml-py comes in; what it answers and raises is as in version 13 of it.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from forwardpass.observability.catalogue import Exporter
from forwardpass.observability.gpu import BOUNDS, FOLD_AT, GpuBatchRecord, GpuReader
from forwardpass.observability.model_metrics import ModelMetrics

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(*sources: Any) -> Samples:
    """What /metrics would say of GPUs, through Prometheus' own parser. A source adds its samples to a table."""
    registry = CollectorRegistry()

    def source(into: dict[str, Any]) -> None:
        for one in sources:
            one(into)

    registry.register(Exporter(source))
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
        if sample.name.startswith("forwardpass_gpu_")
    }


def one(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"forwardpass_gpu_{name}", tuple(sorted(labels.items()))]


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [0, 1, FOLD_AT - 1, FOLD_AT, 2 * FOLD_AT + 3])
def test_every_batch_counts_once_on_its_device(batches: int) -> None:
    metrics = ModelMetrics("m", "1")
    for i in range(batches):
        way = ("graph", "bound", "plain")[i % 3]
        times = (4e-6, 20e-6, 5e-6) if way == "graph" else (None, 20e-6, None) if way == "bound" else ()
        metrics.gpu.ran(GpuBatchRecord(i % 2, way, *times))
    samples = scrape(metrics.snapshot)
    if not batches:
        assert not samples  # a model on the CPU has no samples of GPUs
    for device in (0, 1):
        labels = {"model": "m", "version": "1", "device": f"cuda:{device}"}
        counts = Counter(("graph", "bound", "plain")[i % 3] for i in range(batches) if i % 2 == device)
        for way, count in counts.items():
            assert one(samples, "batches_total", **labels, way=way) == count
        timed = {"copy_in": counts["graph"], "run": counts["graph"] + counts["bound"], "copy_out": counts["graph"]}
        for stage, count in timed.items():
            if count:
                assert one(samples, "stage_seconds_count", **labels, stage=stage) == count
        if timed["run"]:
            assert one(samples, "stage_seconds_sum", **labels, stage="run") == pytest.approx(20e-6 * timed["run"])


def test_times_fall_into_the_buckets_they_belong_to() -> None:
    metrics = ModelMetrics("m", "1")
    runs = [0.0, BOUNDS[0], 1.01 * BOUNDS[0], 0.3, 7.0]
    for run in runs:
        metrics.gpu.ran(GpuBatchRecord(0, "bound", run=run))
    samples = scrape(metrics.snapshot)
    for bound in (*BOUNDS, float("inf")):
        le = "+Inf" if bound == float("inf") else f"{bound:g}"
        found = [
            value
            for (name, pairs), value in samples.items()
            if name == "forwardpass_gpu_stage_seconds_bucket" and float(dict(pairs)["le"]) == float(le)
        ]
        assert found == [sum(run <= bound for run in runs)], le
    assert {dict(pairs)["stage"] for name, pairs in samples if name.endswith("_bucket")} == {"run"}


def test_sessions_of_several_devices_lose_nothing_while_somebody_scrapes() -> None:
    metrics = ModelMetrics("m", "1")

    def work(device: int) -> None:
        for _ in range(2000):
            metrics.gpu.ran(GpuBatchRecord(device, "graph", 1e-6, 1e-6, 1e-6))

    threads = [threading.Thread(target=work, args=(device,)) for device in (0, 0, 1)]
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads):
        scrape(metrics.snapshot)
    samples = scrape(metrics.snapshot)
    counts = [one(samples, "batches_total", model="m", version="1", device=f"cuda:{d}", way="graph") for d in (0, 1)]
    assert counts == [4000, 2000]


# -- NVML -------------------------------------------------------------------------------------------------------------


class NvmlError(Exception):
    """As pynvml.NVMLError: its text is NVML's."""


class Nvml:
    """Two devices, in another order than CUDA's. A name in `fails` raises that text instead."""

    DEVICES: ClassVar = {"00000000:C1:00.0": (25, 3 << 30, 80 << 30), "00000000:41:00.0": (100, 1 << 30, 80 << 30)}

    def __init__(self, **fails: str) -> None:
        self.fails = fails
        self.calls: list[str] = []

    def _answer(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise NvmlError(self.fails[name])

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        self._answer("nvmlInit")

    def nvmlDeviceGetHandleByPciBusId(self, bus: str) -> str:  # noqa: N802 - NVML's name
        self._answer("nvmlDeviceGetHandleByPciBusId")
        return bus

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802 - NVML's name
        self._answer("nvmlDeviceGetUtilizationRates")
        return SimpleNamespace(gpu=self.DEVICES[handle][0], memory=1)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802 - NVML's name
        self._answer("nvmlDeviceGetMemoryInfo")
        _, used, total = self.DEVICES[handle]
        return SimpleNamespace(used=used, total=total, free=total - used)


def reader(nvml: Nvml) -> GpuReader:
    return GpuReader({0: "00000000:41:00.0", 1: "00000000:C1:00.0"}.__getitem__, lambda: nvml)


def test_devices_in_use_are_read_by_their_address() -> None:
    gpus = reader(Nvml())
    samples = scrape(lambda into: gpus.collect([1, 0, 1], into))
    assert one(samples, "utilization_ratio", device="cuda:0") == 1.0
    assert one(samples, "utilization_ratio", device="cuda:1") == 0.25
    assert one(samples, "memory_used_bytes", device="cuda:1") == 3 << 30
    assert one(samples, "memory_total_bytes", device="cuda:0") == 80 << 30
    assert len(samples) == 6


def test_nothing_is_read_but_at_a_scrape_and_handles_are_kept() -> None:
    nvml = Nvml()
    gpus = reader(nvml)
    scrape(lambda into: gpus.collect([], into))
    assert nvml.calls == []  # no model runs on a GPU: NVML is not even loaded
    for _ in range(3):
        scrape(lambda into: gpus.collect([0], into))
    assert nvml.calls.count("nvmlInit") == nvml.calls.count("nvmlDeviceGetHandleByPciBusId") == 1
    assert nvml.calls.count("nvmlDeviceGetMemoryInfo") == 3


def missing() -> Any:
    raise ModuleNotFoundError("No module named 'pynvml'")


@pytest.mark.parametrize(
    ("load", "says"),
    [
        (missing, "nvidia-ml-py is not installed"),
        (lambda: Nvml(nvmlInit="NVML Shared Library Not Found"), "NVML Shared Library Not Found"),
    ],
)
def test_without_nvml_there_are_no_samples_and_one_line_in_the_log(
    caplog: pytest.LogCaptureFixture, load: Any, says: str
) -> None:
    gpus = GpuReader(str, load)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert not scrape(lambda into: gpus.collect([0, 1], into))
    (line,) = caplog.messages
    assert says in line


@pytest.mark.parametrize(
    ("fails", "left"),
    [
        ("nvmlDeviceGetUtilizationRates", {"memory_used_bytes", "memory_total_bytes"}),
        ("nvmlDeviceGetMemoryInfo", {"utilization_ratio"}),
        ("nvmlDeviceGetHandleByPciBusId", set()),
    ],
)
def test_what_a_device_does_not_tell_is_left_out_and_said_once(
    caplog: pytest.LogCaptureFixture, fails: str, left: set[str]
) -> None:
    gpus = reader(Nvml(**{fails: "Not Supported"}))
    for _ in range(3):
        samples = scrape(lambda into: gpus.collect([0], into))
        assert {name.removeprefix("forwardpass_gpu_") for name, _ in samples} == left
    (line,) = caplog.messages
    assert "cuda:0" in line
    assert "Not Supported" in line


def test_a_device_whose_address_cannot_be_had_harms_no_scrape(caplog: pytest.LogCaptureFixture) -> None:
    gpus = GpuReader(lambda device: {0: "00000000:41:00.0"}[device], Nvml)
    samples = scrape(lambda into: gpus.collect([0, 7], into))
    assert {dict(pairs)["device"] for _, pairs in samples} == {"cuda:0"}
    assert "cuda:7" in caplog.text
