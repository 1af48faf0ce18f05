"""The threads of one worker: started when there is something to do for them, and ended once there is not.

A model that nobody asks has none. A session that runs on a thread of its own has it for as long as the worker serves.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from forwardpass.execution.session import Task
from forwardpass.inference.batch_runner import BatchRunner

logger = logging.getLogger(__name__)

IDLE_SECONDS: Final = 10.0  # that a thread waits for a batch before it ends


class WorkerThreads:
    """At most one thread for each instance. The lock of `wake` must be held in every call."""

    def __init__(
        self,
        name: str,
        wake: threading.Condition,
        runners: Sequence[BatchRunner],
        instances: int,
        serve: Callable[[BatchRunner, int], None],
        idle_seconds: float,
    ) -> None:
        """`serve`: what a thread of an instance runs; it takes the lock, and calls `ended` at its end."""
        self._name = name
        self._wake = wake
        self._runners = runners
        self._instances = instances
        self._serve = serve
        self._stay = runners[0].session.own_thread
        self._idle_seconds = None if self._stay else idle_seconds
        self._by_instance: dict[int, Task] = {}
        self._waiting = 0
        self._started = self._ending = False
        self.serving = 0  # threads that take from the queue

    def start(self) -> None:
        self._started = True
        if self._stay:
            for instance in range(self._instances):
                self._start(instance)

    def _start(self, instance: int) -> None:
        """Raises RuntimeError where the system has no more threads."""
        runner = self._runners[instance % len(self._runners)]
        job = partial(self._serve, runner, instance)
        name = f"{self._name}#{instance}"
        thread = runner.session.long_task(job) or threading.Thread(target=job, name=name, daemon=True)
        thread.start()
        self._by_instance[instance] = thread
        self.serving += 1

    def call(self) -> bool:
        """Have a thread take the next batch: one that waits, else one more. Returns whether any thread will take it."""
        if self._waiting:
            self._wake.notify()
        elif self._started and not self._ending and self.serving < self._instances:
            try:
                self._start(next(i for i in range(self._instances) if i not in self._by_instance))
            except RuntimeError as error:
                logger.warning("model %s: no thread could be started for its runs: %s", self._name, error)
        return self.serving > 0 or not (self._started or self._ending)

    def wait(self, seconds: float | None) -> bool:
        """Wait to be called, for `seconds` at most; None: for long. Returns whether the thread must go on serving."""
        self._waiting += 1
        called = self._wake.wait(self._idle_seconds if seconds is None else seconds)
        self._waiting -= 1
        return called or seconds is not None

    def ended(self, instance: int) -> None:
        """The thread of an instance ends."""
        self.serving -= 1
        if not self._ending:
            del self._by_instance[instance]

    def end(self) -> list[Task]:
        """Have all threads end once the queue is empty. Returns them, to be joined without the lock."""
        self._ending = True
        self._serve = _nothing  # the worker's own method: it would keep the worker, and its network, from being freed
        self._wake.notify_all()
        return list(self._by_instance.values())


def _nothing(_runner: BatchRunner, _instance: int) -> None:
    """What is run once no thread is started any more."""
