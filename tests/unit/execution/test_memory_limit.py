"""How much memory a process may have, from files as the two kinds of cgroup write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from forwardpass.execution.memory_limit import memory_limit

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, MACHINE),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}, MACHINE),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "900000\n",
                "sys/fs/cgroup/a/memory.max": "500000\n",
            },
            500000,
        ),
        ({"proc/self/cgroup": "0::/elsewhere\n", "sys/fs/cgroup/memory.max": "700000\n"}, 700000),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/pod\n",
                "sys/fs/cgroup/memory/pod/memory.limit_in_bytes": "600000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            600000,
        ),
    ],
)
def test_the_least_limit_counts(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert memory_limit(put(tmp_path, files)) == expected
