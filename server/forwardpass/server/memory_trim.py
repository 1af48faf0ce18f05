"""Gives memory back to the system after much of it was freed. For the C library's allocator (glibc); else does nothing.

glibc keeps what is freed for later, except at the end of its heaps: after a burst of large answers a process stays as
large as it ever was. `malloc_trim` gives back every free page, and other threads' allocations may wait meanwhile, so
it is called seldom.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

LEAST: Final = 32 << 20  # bytes that are worth it
PAUSE: Final = 3.0  # seconds between two looks
ARENA_LEAST: Final = 256 << 20  # bytes by which the process must have grown
ARENA_PAUSE: Final = 30.0  # seconds for which it must have been so


class MallocState(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


class MemoryTrimmer:
    """For one thread. `look` when time passes."""

    def __init__(
        self,
        trim: Callable[[], object] | None = None,
        free: Callable[[], int] | None = None,
        resident: Callable[[], int] | None = None,
    ) -> None:
        """The functions are the system's unless given: give memory back; bytes that the allocator keeps though they
        are free; bytes that the process has."""
        functions = (trim, free) if trim is not None and free is not None else _of_glibc()
        self._trim: Callable[[], object] | None = None
        self._free: Callable[[], int] | None = None
        if functions is not None:
            self._trim, self._free = functions
        self._resident = resident or resident_bytes
        self._least_free = self._bytes_free()  # since memory was given back
        self._least_resident = self._resident()
        self._at = 0.0

    def look(self, now: float) -> bool:
        """Give memory back if there is much of it, at most once in PAUSE. `now`: seconds. Returns whether it did."""
        if self._trim is None or now < self._at:
            return False
        self._at = now + PAUSE
        free, resident = self._bytes_free(), self._resident()
        self._least_free = min(self._least_free, free)
        self._least_resident = min(self._least_resident, resident)
        grown = resident - self._least_resident
        # Free pages that were given back count as free still: what was freed since is what the allocator has more of,
        # or, where that was taken and freed between two looks, what the process has more of.
        if free - self._least_free < LEAST and min(free, grown) < LEAST:
            return False
        self._trim()
        self._least_free, self._least_resident = self._bytes_free(), self._resident()
        return True

    def _bytes_free(self) -> int:
        return 0 if self._free is None else self._free()


class ArenaTrimmer:
    """Gives back what runs took of the shared arena and none uses any more. For one thread; `look` when time passes.

    What it holds can't be asked for, so the process's growth decides: a run that was an outlier has made it grow, and
    where large runs are the rule their memory is taken anew once in ARENA_PAUSE, which costs them a part in a thousand.
    """

    def __init__(self, shrink: Callable[[], object], resident: Callable[[], int] | None = None) -> None:
        """`shrink`: give back what no run uses; may take some milliseconds."""
        self._shrink = shrink
        self._resident = resident or resident_bytes
        self._least = self._resident()
        self._at = 0.0  # when it may be shrunk; 0: it has not grown

    def look(self, now: float) -> bool:
        """Shrink it if the process has grown by ARENA_LEAST since, ARENA_PAUSE ago. `now`: seconds, above 0."""
        resident = self._resident()
        self._least = min(self._least, resident)
        if resident - self._least < ARENA_LEAST:
            self._at = 0.0
            return False
        if not self._at:
            self._at = now + ARENA_PAUSE
        if now < self._at:
            return False
        self._shrink()
        self._at, self._least = 0.0, self._resident()
        return True


def resident_bytes() -> int:
    """The memory that the process has; 0 where it can't be known."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _of_glibc() -> tuple[Callable[[], object], Callable[[], int]] | None:
    """The functions `trim` and `free`; None without glibc, or with one before 2.33."""
    try:
        library = ctypes.CDLL(None)
        trim, state = library.malloc_trim, library.mallinfo2
        library.gnu_get_libc_version  # noqa: B018  # musl and others may have the two by name
    except (OSError, AttributeError):
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    state.argtypes, state.restype = [], MallocState

    def free() -> int:
        return int(state().fordblks)

    return lambda: trim(0), free
