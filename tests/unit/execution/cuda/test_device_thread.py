"""A thread that belongs to one thing: jobs in order, their results and errors to whoever asked, and its end."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from functools import partial

import pytest

from forwardpass.execution.cuda.device_thread import DeviceThread


def test_jobs_are_done_in_order_by_one_thread() -> None:
    thread = DeviceThread("t")
    done: list[tuple[int, int]] = []
    for i in range(20):
        assert thread.call(lambda i=i: done.append((i, threading.get_ident())) or i) == i  # type: ignore[func-returns-value]
    assert [i for i, _ in done] == list(range(20)) and {ident for _, ident in done} == {thread.ident}
    assert thread.ident != threading.get_ident()
    thread.end()
    assert thread.join(60.0)


def test_a_job_may_ask_for_another() -> None:
    thread = DeviceThread("t")
    assert thread.call(lambda: thread.call(threading.get_ident)) == thread.ident
    thread.end()


def test_an_error_goes_to_whoever_asked_and_ends_nothing() -> None:
    thread = DeviceThread("t")

    def fails() -> None:
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        thread.call(fails)
    assert thread.call(lambda: 7) == 7
    thread.end()


def test_what_was_given_before_the_end_is_done_and_then_the_last_job() -> None:
    thread = DeviceThread("t")
    may, done = threading.Event(), []
    long_task = thread.long_task(lambda: (may.wait(60.0), done.append("long_task")))
    long_task.start()
    thread.end(lambda: done.append("last"))
    with pytest.raises(RuntimeError, match="the thread t has ended"):
        thread.call(lambda: done.append("never"))
    may.set()
    assert thread.join(60.0)
    assert done == ["long_task", "last"]


def test_a_stint_is_waited_for_as_a_thread_is(caplog: pytest.LogCaptureFixture) -> None:
    thread = DeviceThread("t")
    may = threading.Event()

    def serve() -> None:
        may.wait(60.0)
        raise RuntimeError("out of the blue")

    long_task = thread.long_task(serve)
    assert not long_task.is_alive()
    long_task.join(0.0)
    long_task.start()
    long_task.join(0.01)
    assert long_task.is_alive()
    with caplog.at_level(logging.ERROR):
        may.set()
        long_task.join(60.0)
    assert not long_task.is_alive()
    assert "out of the blue" in caplog.text  # nobody else would be told
    assert thread.call(lambda: 1) == 1
    thread.end()


def test_nothing_of_a_job_is_kept() -> None:
    class Held:
        pass

    thread = DeviceThread("t")
    held = Held()
    seen = weakref.ref(held)
    thread.call(partial(id, held))
    long_task = thread.long_task(partial(id, held))
    long_task.start()
    long_task.join(60.0)
    thread.call(lambda: None)
    del held, long_task
    gc.collect()
    assert seen() is None
    thread.end()
