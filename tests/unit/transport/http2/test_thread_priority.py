"""Asking Linux to run a thread promptly changes nothing else about it."""

from __future__ import annotations

import os
import platform
import threading

import pytest

from forwardpass.transport.http2.thread_priority import schedule_promptly


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"), reason="needs Linux's scheduler"
)
def test_a_thread_is_hurried_and_keeps_its_rank() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        thread_id = thread.native_id
        assert thread_id is not None
        nice = os.getpriority(os.PRIO_PROCESS, thread_id)
        assert schedule_promptly(thread_id)
        assert os.sched_getscheduler(thread_id) == os.SCHED_OTHER
        assert os.getpriority(os.PRIO_PROCESS, thread_id) == nice
    finally:
        done.set()
        thread.join()


def test_a_thread_that_is_gone_is_no_error() -> None:
    assert not schedule_promptly(2**22 + 1)  # beyond what Linux numbers threads to
