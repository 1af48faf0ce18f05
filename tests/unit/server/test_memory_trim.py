"""When memory is given back to the system, by figures of the test's own; and that it is, by the real allocator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.service import models

from forwardpass.execution import shared_arena
from forwardpass.execution.ort_session import OrtSession
from forwardpass.execution.placement import CPU, Placement
from forwardpass.server.memory_trim import (
    ARENA_LEAST,
    ARENA_PAUSE,
    LEAST,
    PAUSE,
    ArenaTrimmer,
    MemoryTrimmer,
    resident_bytes,
)


class Allocator:
    """`free` bytes are kept, of which `given` are not the process's any more."""

    def __init__(self) -> None:
        self.used, self.free, self.given, self.trims = 0, 0, 0, 0

    def trim(self) -> None:
        self.given = self.free
        self.trims += 1

    def take(self, nbytes: int) -> None:
        self.given -= min(nbytes, self.given)
        self.free, self.used = max(0, self.free - nbytes), self.used + nbytes

    def give(self, nbytes: int) -> None:
        self.free, self.used = self.free + nbytes, self.used - nbytes

    def trimmer(self) -> MemoryTrimmer:
        return MemoryTrimmer(self.trim, lambda: self.free, lambda: self.used + self.free - self.given)


def test_what_was_freed_is_given_back_once_and_again() -> None:
    memory = Allocator()
    trimmer = memory.trimmer()
    for i in range(3):
        now = 10.0 * i
        memory.take(4 * LEAST)
        assert not trimmer.look(now)
        memory.give(4 * LEAST)
        assert not trimmer.look(now + PAUSE / 2)  # too soon
        assert trimmer.look(now + PAUSE)
        assert not trimmer.look(now + 2 * PAUSE)
        assert memory.trims == i + 1


def test_what_came_and_went_between_two_looks_is_given_back() -> None:
    memory = Allocator()
    trimmer = memory.trimmer()
    for i in range(2):
        memory.take(2 * LEAST)
        memory.give(2 * LEAST)
        assert trimmer.look(10.0 * i) and memory.trims == i + 1


def test_what_is_in_use_or_little_is_left_alone() -> None:
    memory = Allocator()
    trimmer = memory.trimmer()
    memory.take(100 * LEAST)
    assert not trimmer.look(1.0)
    memory.give(LEAST // 2)
    assert not trimmer.look(10.0)


IN_A_PROCESS = """
from forwardpass.server.memory_trim import LEAST, MemoryTrimmer, resident_bytes

trimmer = MemoryTrimmer()
if trimmer._trim is None:
    raise SystemExit("the C library is not glibc of 2.33 or later")
kept, freed = [], []
for _ in range(3 * LEAST >> 16):
    freed.append(b"\\1" * (60 << 10))  # below the size from which blocks are mapped by themselves
    kept.append(bytes(600))
before = resident_bytes()
freed.clear()
assert trimmer.look(1.0)
assert before - resident_bytes() > 2 * LEAST, (before, resident_bytes())
"""


def test_the_real_allocator_gives_back_what_lies_between_what_stays() -> None:
    # In a process of its own: what other tests freed here would be taken first, and count as free before and after.
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS], capture_output=True, text=True, timeout=60)
    if "glibc" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr


def test_the_arena_shrinks_once_the_process_has_been_large_for_a_while() -> None:
    resident, shrunk = 10, []

    def shrink() -> None:
        shrunk.append(resident)

    trimmer = ArenaTrimmer(shrink, lambda: resident)
    resident += ARENA_LEAST - 1
    assert not any(trimmer.look(1.0 + i * ARENA_PAUSE) for i in range(5))
    resident += 1
    assert not trimmer.look(200.0) and not trimmer.look(200.0 + ARENA_PAUSE - 1)
    assert trimmer.look(200.0 + ARENA_PAUSE) and len(shrunk) == 1
    # What stays large all the same, such as weights, is where growth counts from; what comes down by itself is left.
    assert not trimmer.look(300.0) and not trimmer.look(300.0 + ARENA_PAUSE)
    resident += ARENA_LEAST
    assert not trimmer.look(400.0)
    resident -= ARENA_LEAST
    assert not trimmer.look(401.0)
    resident += ARENA_LEAST
    assert not trimmer.look(400.0 + ARENA_PAUSE), "it has been large for a moment only"


@pytest.mark.skipif(not resident_bytes(), reason="needs Linux's /proc/self/statm")
def test_what_an_outlier_took_of_the_real_arena_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(models.allocate(), path)
    session = OrtSession(path, Placement(CPU, 0, 1, ""), opening=shared_arena.use)
    session.run([np.array([[10]], np.int64)], (0,))
    shared_arena.shrink()
    trimmer = ArenaTrimmer(shared_arena.shrink)
    before = resident_bytes()
    session.run([np.array([[40_000_000]], np.int64)], (0,))  # 320 MB
    assert resident_bytes() - before > 300e6
    assert not trimmer.look(1.0) and trimmer.look(1.0 + ARENA_PAUSE)
    assert resident_bytes() - before < 50e6
