"""How soon Linux runs the receiving thread while another thread computes on its core. Other systems: no effect."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import struct

# Numbers of the system call sched_setattr, which Python's os module lacks.
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_SCHED_ATTR = struct.Struct("=IIQiIQQQII")  # size, policy, flags, nice, priority, runtime, deadline, period, clamps
SHORT_SLICE = 100_000  # ns, the least Linux accepts; its default is a few milliseconds


def schedule_promptly(thread_id: int) -> bool:
    """Ask Linux to schedule this thread promptly, in short slices, when it competes with a compute thread.

    Returns whether the kernel accepted. A thread with a shorter slice runs at once when it wakes (Linux 6.12 and later;
    before that this changes nothing), and gets no larger share of the core. Without it, the thread may wait until the
    other's slice is over, for milliseconds: long against a 20 ms deadline. Needs no privilege.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or platform.system() != "Linux":
        return False
    nice = os.getpriority(os.PRIO_PROCESS, 0)  # kept as it is: lowering it takes a privilege
    attr = _SCHED_ATTR.pack(_SCHED_ATTR.size, os.SCHED_OTHER, 0, nice, 0, SHORT_SLICE, 0, 0, 0, 0)
    return bool(_libc().syscall(number, thread_id, attr, 0) == 0)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
