"""A thread that runs all jobs of one session, one after the other.

So every job finds the state that CUDA keeps for a thread (its device, and in ONNX Runtime its graphs).
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
Job = Callable[[], object]


class _Call:
    """One job and its outcome."""

    __slots__ = ("done", "error", "job", "result")

    def __init__(self, job: Job) -> None:
        self.job: Job | None = job
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = threading.Event()


class DeviceThread:
    """Runs jobs until `end`. Thread-safe.

    - A job submitted by the thread itself is run at once.
    - The thread does not keep the process alive, and keeps no reference to a finished job.
    """

    def __init__(self, name: str) -> None:
        self._ended = False
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._calls,), name=name, daemon=True)
        self._thread.start()
        self.ident = self._thread.ident

    def call(self, job: Callable[[], T]) -> T:
        """Run `job` and return its result, or raise its exception. Blocks until earlier jobs and this one are done.

        Raises RuntimeError after `end`.
        """
        if threading.get_ident() == self.ident:
            return job()
        if self._ended:
            raise RuntimeError(f"the thread {self._thread.name} has ended")
        call = self._post(job)
        call.done.wait()
        if call.error is not None:
            raise call.error
        result: T = call.result
        return result

    def long_task(self, job: Job) -> LongTask:
        """A job that can be started and joined like a thread."""
        return LongTask(self._post, job)

    def end(self, last: Job | None = None) -> None:
        """Run the jobs submitted before, then `last`, then end the thread. Does not block; `join` waits."""
        self._ended = True
        if last is not None:
            self._post(last)
        self._calls.put(None)

    def join(self, seconds: float | None = None) -> bool:
        """Wait for the thread to end. Returns whether it ended in time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _post(self, job: Job) -> _Call:
        call = _Call(job)
        self._calls.put(call)
        return call


class LongTask:
    """One long job on a DeviceThread, with the methods of threading.Thread."""

    def __init__(self, post: Callable[[Job], _Call], job: Job) -> None:
        self._post = post
        self._job: Job | None = job
        self._call: _Call | None = None

    def start(self) -> None:
        """Start the job. Must be called only once."""
        assert self._job is not None, "a long_task is started once"
        self._call, self._job = self._post(partial(_logged, self._job)), None

    def join(self, timeout: float | None = None) -> None:
        if self._call is not None:
            self._call.done.wait(timeout)

    def is_alive(self) -> bool:
        return self._call is not None and not self._call.done.is_set()


def _logged(job: Job) -> None:
    """Run `job` and log its exception: the outcome of a long task is never read."""
    try:
        job()
    except Exception:
        logger.exception("a thread of a model ended unexpectedly")


def _work(calls: queue.SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        assert call.job is not None
        try:
            call.result = call.job()
        except BaseException as error:  # raised again in the calling thread
            call.error = error
        call.job = None
        call.done.set()
        del call
