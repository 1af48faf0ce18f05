"""The number of processes that --processes auto takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.processes import process_count
from forwardpass.settings import Settings


def cores(count: int) -> CpuBudget:
    return CpuBudget(count, f"{count} cores, no quota")


@pytest.mark.parametrize(
    ("count", "weights", "processes"),
    [(1, 1000, 1), (2, 1000, 2), (16, 330_000, 12), (16, 1000, 16), (2, 100_000_000, 1), (64, 100_000_000, 1)],
)
def test_small_networks_take_a_process_for_each_core_and_large_ones_do_not(
    count: int, weights: int, processes: int
) -> None:
    assert process_count.choose(cores(count), weights, on_cpu=True).processes == processes


def test_a_device_takes_one_and_no_network_takes_all() -> None:
    assert process_count.choose(cores(16), 1000, on_cpu=False).processes == 1
    assert process_count.choose(cores(16), None, on_cpu=True).processes == 16


def test_the_smallest_network_counts_with_all_of_its_files(tmp_path: Path) -> None:
    assert process_count.smallest_weights(tmp_path) is None
    for name, files in {"big": {"model.onnx": 10, "model.onnx.data": 5000}, "small": {"model.onnx": 700}}.items():
        folder = tmp_path / name / "1"
        folder.mkdir(parents=True)
        for file, size in files.items():
            (folder / file).write_bytes(bytes(size))
        (folder / "contract.json").write_bytes(bytes(9))
    assert process_count.smallest_weights(tmp_path) == 700


def test_what_is_configured_comes_first() -> None:
    assert process_count.of(Settings(processes=3), cores(2)) == (3, "as configured")
    assert process_count.of(Settings(processes="auto", transport="grpcio"), cores(2)).processes == 1  # type: ignore[arg-type]
