"""How many cores there are, read from control groups of either version that the test makes itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from forwardpass.execution.cpu_budget import available, cgroup_quota


def make(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/kubepods/pod1/box\n"}
V1 = {"proc/self/cgroup": "12:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({**V2, "sys/fs/cgroup/kubepods/pod1/box/cpu.max": "max 100000\n"}, None),
        ({**V2, "sys/fs/cgroup/kubepods/pod1/box/cpu.max": "150000 100000\n"}, 1.5),
        # The tightest on the way to the root counts, wherever it is set.
        (
            {
                **V2,
                "sys/fs/cgroup/kubepods/pod1/box/cpu.max": "400000 100000",
                "sys/fs/cgroup/kubepods/pod1/cpu.max": "200000 100000",
                "sys/fs/cgroup/kubepods/cpu.max": "max 100000",
            },
            2.0,
        ),
        # In a container the group's own path is not mounted: its quota is at the mount.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        ({**V2, "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        (
            {
                **V1,
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        (
            {
                **V1,
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            {
                **V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        # Only the cpu controller's line says where to look.
        (
            {
                "proc/self/cgroup": "3:memory:/elsewhere\n",
                "sys/fs/cgroup/cpu/elsewhere/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpu/elsewhere/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        ({"proc/self/cgroup": "nonsense\n\n0::/../../x\n", "sys/fs/cgroup/cpu.max": "broken\n"}, None),
    ],
)
def test_the_quota_is_found(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cgroup_quota(make(tmp_path, files)) == quota


def test_a_quota_below_the_affinity_counts_and_is_rounded_up(tmp_path: Path) -> None:
    cores = available(make(tmp_path, {**V2, "sys/fs/cgroup/cpu.max": "20000 100000\n"}))
    assert (cores.count, cores.why) == (1, "cgroup quota of 0.2 cores")


def test_a_quota_above_the_affinity_changes_nothing(tmp_path: Path) -> None:
    cores = available(make(tmp_path, {**V2, "sys/fs/cgroup/cpu.max": "99900000 100000\n"}))
    assert cores == available(tmp_path / "nothing here")
    assert cores.count == len(os.sched_getaffinity(0))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="this machine lets the tests use one core only")
def test_an_affinity_mask_counts_and_is_said() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        cores = available(Path("/nonexistent"))
    finally:
        os.sched_setaffinity(0, before)
    assert cores.count == 1 and "affinity to 1 of" in cores.why
