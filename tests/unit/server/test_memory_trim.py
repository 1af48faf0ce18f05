"""When memory is given back to the system, by figures of the test's own; and that it is, by the real allocator."""

from __future__ import annotations

import pytest

from forwardpass.server.memory_trim import LEAST, PAUSE, MemoryTrimmer, resident_bytes


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


def test_the_real_allocator_gives_back_what_lies_between_what_stays() -> None:
    trimmer = MemoryTrimmer()
    if trimmer._trim is None:
        pytest.skip("the C library is not glibc of 2.33 or later")
    kept, freed = [], []
    for _ in range(3 * LEAST >> 16):
        freed.append(b"\1" * (60 << 10))  # below the size from which blocks are mapped by themselves
        kept.append(bytes(600))
    before = resident_bytes()
    freed.clear()
    assert trimmer.look(1.0)
    assert before - resident_bytes() > 2 * LEAST
    assert len(kept)
