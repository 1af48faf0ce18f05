"""The number of threads per run, and its reason: from the cgroup's CPU quota (v1 or v2) and the process's affinity.

ONNX Runtime sizes its pool from the host's cores, which in a container with a quota of two cores on a 64-core host
makes 64 threads that throttle each other. Nothing here is cached: tests point `root` at their own files.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CpuBudget:
    """Cores this process may use at once, at least 1, and the reason in words."""

    count: int
    why: str


def available(root: Path = Path("/")) -> CpuBudget:
    """The smaller of the affinity mask and the cgroup's quota, rounded up to whole cores."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        allowed = os.cpu_count() or 1
    host = os.cpu_count() or allowed
    quota = cgroup_quota(root)
    if quota is not None and quota < allowed:
        return CpuBudget(max(1, math.ceil(quota)), f"cgroup quota of {quota:g} cores")
    if allowed < host:
        return CpuBudget(max(1, allowed), f"affinity to {allowed} of {host} cores")
    return CpuBudget(max(1, allowed), f"{allowed} cores, no quota")


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """The smallest CPU quota in cores on the path from this process's cgroup to the root; None if there is none."""
    quotas = []
    for folder in cgroup_folders(root, "cpu"):
        quota = _quota_v2(folder / "cpu.max")
        if quota is None:
            quota = _quota_v1(folder)
        if quota is not None:
            quotas.append(quota)
    return min(quotas, default=None)


def cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Every cgroup folder that may hold a limit of `controller` for this process, from its own up to the mount."""
    mount = root / "sys/fs/cgroup"
    found: list[Path] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        base = mount / controller if controllers else mount
        folder = base / path.lstrip("/")
        while True:
            found.append(folder)
            if folder == base or base not in folder.parents:
                break
            folder = folder.parent
    # In a container the path above may not be mounted; then the quota is at the mount itself.
    found += [mount, mount / controller]
    return found


def _quota_v2(path: Path) -> float | None:
    words = _read(path).split()
    if len(words) != 2 or words[0] == "max":
        return None
    return int(words[0]) / int(words[1])


def _quota_v1(folder: Path) -> float | None:
    quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
    if not quota or not period or int(quota) <= 0:
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
