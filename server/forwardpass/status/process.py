"""Facts about this process, from /proc where there is one: memory, threads, open files. Reads, and caches nothing."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from forwardpass.execution.cpu_budget import CpuBudget


def facts(cores: CpuBudget, proc: Path = Path("/proc/self")) -> dict[str, Any]:
    """None stands for what this system does not tell."""
    return {
        "pid": os.getpid(),
        "cores": cores.count,
        "cores_why": cores.why,
        "resident_bytes": _resident(proc),
        "threads": _threads(proc),
        "open_files": _open_files(proc),
    }


def _resident(proc: Path) -> int | None:
    try:
        return int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _threads(proc: Path) -> int:
    """All threads where /proc counts them; otherwise those that the interpreter knows."""
    try:
        return sum(1 for _ in (proc / "task").iterdir())
    except OSError:
        return threading.active_count()


def _open_files(proc: Path) -> int | None:
    try:
        return sum(1 for _ in (proc / "fd").iterdir()) - 1  # one of them reads the folder
    except OSError:
        return None
