"""The memory that this process may have: of its cgroup (v1 or v2), else of the machine. Nothing is cached."""

from __future__ import annotations

import os
from pathlib import Path

from forwardpass.execution.cpu_budget import cgroup_folders


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes; the machine's where no limit is set below that. 0: not known."""
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        machine = 0
    limits = [machine] if machine > 0 else []
    for folder in cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                continue
            if text.isdigit():  # "max" where there is none; v1 has a number beyond every machine then
                limits.append(int(text))
    return min(limits, default=0)
